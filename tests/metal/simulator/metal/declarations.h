// Metal's names, declared and not defined, with its address spaces: for the type check by libclang, in C++14
// as Metal's own language is. The simulator's other headers have no address spaces, and this one cannot run.
#pragma once

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel
#define METAL_FUNC inline
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define __HAVE_BFLOAT__ 1
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX 3.40282347e+38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.19209290e-07f
#define HALF_MAX half(65504.0f)
#define M_PI_F 3.14159265f
#define M_LN2_F 0.693147181f
#define M_LOG2E_F 1.44269504f
#define M_SQRT1_2_F 0.707106781f
#define M_SQRT2_F 1.41421356f
#define M_2_SQRTPI_F 1.12837917f
#define MLX_MTL_PRAGMA_UNROLL

using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long;
using size_t = unsigned long;
using ptrdiff_t = long;
using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using half = _Float16;
using bfloat = __bf16;
using float16_t = half;
using bfloat16_t = bfloat;

struct complex64_t {
  float real, imag;
};

// ---- Vectors are clang's own, which loads and stores them in every address space. They have no
// constructors, so `uint2(a, b)`, a name before a parenthesis, becomes a call of make<uint2>.

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

template <class V, class... Parts>
V make(Parts...);

#define VECTOR_NAMES(T)                                                                                      \
  using T##2 = vec<T, 2>;                                                                                    \
  using T##3 = vec<T, 3>;                                                                                    \
  using T##4 = vec<T, 4>;

VECTOR_NAMES(float)
VECTOR_NAMES(half)
VECTOR_NAMES(bfloat)
VECTOR_NAMES(char)
VECTOR_NAMES(uchar)
VECTOR_NAMES(short)
VECTOR_NAMES(ushort)
VECTOR_NAMES(int)
VECTOR_NAMES(uint)
VECTOR_NAMES(long)
VECTOR_NAMES(ulong)
VECTOR_NAMES(bool)

#define float2(...) make<float2>(__VA_ARGS__)
#define float3(...) make<float3>(__VA_ARGS__)
#define float4(...) make<float4>(__VA_ARGS__)
#define half2(...) make<half2>(__VA_ARGS__)
#define half3(...) make<half3>(__VA_ARGS__)
#define half4(...) make<half4>(__VA_ARGS__)
#define bfloat2(...) make<bfloat2>(__VA_ARGS__)
#define bfloat3(...) make<bfloat3>(__VA_ARGS__)
#define bfloat4(...) make<bfloat4>(__VA_ARGS__)
#define char2(...) make<char2>(__VA_ARGS__)
#define char3(...) make<char3>(__VA_ARGS__)
#define char4(...) make<char4>(__VA_ARGS__)
#define uchar2(...) make<uchar2>(__VA_ARGS__)
#define uchar3(...) make<uchar3>(__VA_ARGS__)
#define uchar4(...) make<uchar4>(__VA_ARGS__)
#define short2(...) make<short2>(__VA_ARGS__)
#define short3(...) make<short3>(__VA_ARGS__)
#define short4(...) make<short4>(__VA_ARGS__)
#define ushort2(...) make<ushort2>(__VA_ARGS__)
#define ushort3(...) make<ushort3>(__VA_ARGS__)
#define ushort4(...) make<ushort4>(__VA_ARGS__)
#define int2(...) make<int2>(__VA_ARGS__)
#define int3(...) make<int3>(__VA_ARGS__)
#define int4(...) make<int4>(__VA_ARGS__)
#define uint2(...) make<uint2>(__VA_ARGS__)
#define uint3(...) make<uint3>(__VA_ARGS__)
#define uint4(...) make<uint4>(__VA_ARGS__)
#define long2(...) make<long2>(__VA_ARGS__)
#define long3(...) make<long3>(__VA_ARGS__)
#define long4(...) make<long4>(__VA_ARGS__)
#define ulong2(...) make<ulong2>(__VA_ARGS__)
#define ulong3(...) make<ulong3>(__VA_ARGS__)
#define ulong4(...) make<ulong4>(__VA_ARGS__)

template <class To, class From>
To as_type(From);

// ---- Traits.

namespace metal {

using ::as_type;
using ::vec;

template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
  using value_type = T;
  constexpr operator T() const { return v; }
};

template <bool v>
using bool_constant = integral_constant<bool, v>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <class A, class B>
struct is_same : false_type {};
template <class A>
struct is_same<A, A> : true_type {};
template <class A, class B>
constexpr bool is_same_v = is_same<A, B>::value;

template <bool, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool condition, class T = void>
using enable_if_t = typename enable_if<condition, T>::type;

template <bool, class A, class B>
struct conditional {
  using type = A;
};
template <class A, class B>
struct conditional<false, A, B> {
  using type = B;
};
template <bool condition, class A, class B>
using conditional_t = typename conditional<condition, A, B>::type;

template <class T>
constexpr bool is_floating_point_v = is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T>
constexpr bool is_integral_v = __is_integral(T);
template <class T>
struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T>
constexpr bool is_arithmetic_v = is_floating_point_v<T> || is_integral_v<T>;
template <class T>
constexpr bool is_signed_v = __is_signed(T);
template <class T>
constexpr bool is_unsigned_v = __is_unsigned(T);
template <class T>
using remove_cv_t = __remove_cv(T);
template <class T>
using remove_const_t = __remove_const(T);
template <class T>
using remove_reference_t = __remove_reference_t(T);
template <class T>
using remove_addrspace_t = T;
template <class T>
using make_signed_t = __make_signed(T);
template <class T>
using make_unsigned_t = __make_unsigned(T);

// The types are right, the values are not.
template <class T>
struct numeric_limits {
  static constexpr int digits = 8 * sizeof(T);
  static constexpr T min() { return T(); }
  static constexpr T max() { return T(); }
  static constexpr T lowest() { return T(); }
  static constexpr T epsilon() { return T(); }
  static constexpr T infinity() { return T(); }
  static constexpr T quiet_NaN() { return T(); }
};

// ---- Functions.

template <class T>
struct as_given {
  using type = T;
};
template <class T>
using as_given_t = typename as_given<T>::type;  // takes no part in deduction

#define UNARY(name)                                                                                          \
  float name(float);                                                                                         \
  half name(half);                                                                                           \
  bfloat name(bfloat);                                                                                       \
  template <class T, int N>                                                                                  \
  vec<T, N> name(vec<T, N>);

#define BINARY(name)                                                                                         \
  float name(float, float);                                                                                  \
  half name(half, half);                                                                                     \
  bfloat name(bfloat, bfloat);                                                                               \
  template <class T, int N>                                                                                  \
  vec<T, N> name(vec<T, N>, as_given_t<vec<T, N>>);

#define TERNARY(name)                                                                                        \
  float name(float, float, float);                                                                           \
  half name(half, half, half);                                                                               \
  bfloat name(bfloat, bfloat, bfloat);                                                                       \
  template <class T, int N>                                                                                  \
  vec<T, N> name(vec<T, N>, as_given_t<vec<T, N>>, as_given_t<vec<T, N>>);

UNARY(acos) UNARY(acosh) UNARY(asin) UNARY(asinh) UNARY(atan) UNARY(atanh) UNARY(ceil) UNARY(cos) UNARY(cosh)
UNARY(cospi) UNARY(exp) UNARY(exp2) UNARY(exp10) UNARY(fabs) UNARY(floor) UNARY(fract) UNARY(log) UNARY(log2)
UNARY(log10) UNARY(rint) UNARY(round) UNARY(rsqrt) UNARY(saturate) UNARY(sign) UNARY(sin) UNARY(sinh)
UNARY(sinpi) UNARY(sqrt) UNARY(tan) UNARY(tanh) UNARY(trunc)
BINARY(atan2) BINARY(copysign) BINARY(divide) BINARY(fdim) BINARY(fmax) BINARY(fmin) BINARY(fmod) BINARY(pow)
BINARY(powr) BINARY(step)
TERNARY(fma) TERNARY(mix)

// Overloads for each type, so that arguments of two types are ambiguous.
#define OF_INTEGERS(declare) \
  declare(char) declare(uchar) declare(short) declare(ushort) \
  declare(int) declare(uint) declare(long) declare(ulong)

#define DECLARE_1(T) T abs(T); T clz(T); T ctz(T); T popcount(T); T reverse_bits(T);
#define DECLARE_2(T) T max(T, T); T min(T, T); T absdiff(T, T); T mulhi(T, T); T rotate(T, T);
#define DECLARE_3(T) T clamp(T, T, T); T max3(T, T, T); T min3(T, T, T);
#define DECLARE_BITS(T) T extract_bits(T, uint, uint); T insert_bits(T, T, uint, uint);

UNARY(abs) BINARY(max) BINARY(min) TERNARY(clamp) TERNARY(max3) TERNARY(min3)
OF_INTEGERS(DECLARE_1) OF_INTEGERS(DECLARE_2) OF_INTEGERS(DECLARE_3) OF_INTEGERS(DECLARE_BITS)

int mad24(int, int, int);
uint mad24(uint, uint, uint);
int mul24(int, int);
uint mul24(uint, uint);
bool isnan(float);
bool isinf(float);
bool isfinite(float);
bool isnormal(float);
bool signbit(float);

template <class T>
T select(T, as_given_t<T>, bool);
template <class T, int N, class Condition>
vec<T, N> select(vec<T, N>, as_given_t<vec<T, N>>, Condition);
template <class Condition>
bool any(Condition);
template <class Condition>
bool all(Condition);
template <class T, int N>
T dot(vec<T, N>, as_given_t<vec<T, N>>);
template <class T, int N>
T length(vec<T, N>);
template <class T, int N>
T length_squared(vec<T, N>);

namespace precise {
using namespace metal;
}
namespace fast {
using namespace metal;
}

// ---- Simdgroups and barriers.

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

#define OF_ONE(name)                                                                                         \
  template <class T>                                                                                         \
  T name(T);

#define OF_ANOTHER_LANE(name)                                                                                \
  template <class T>                                                                                         \
  T name(T, ushort);

OF_ONE(simd_sum) OF_ONE(simd_product) OF_ONE(simd_max) OF_ONE(simd_min) OF_ONE(simd_and) OF_ONE(simd_or)
OF_ONE(simd_xor) OF_ONE(quad_sum) OF_ONE(quad_product) OF_ONE(quad_max) OF_ONE(quad_min)
OF_ONE(simd_prefix_inclusive_sum) OF_ONE(simd_prefix_exclusive_sum) OF_ONE(simd_prefix_inclusive_product)
OF_ONE(simd_prefix_exclusive_product) OF_ONE(simd_broadcast_first)
OF_ANOTHER_LANE(simd_shuffle) OF_ANOTHER_LANE(simd_broadcast) OF_ANOTHER_LANE(simd_shuffle_xor)
OF_ANOTHER_LANE(simd_shuffle_down) OF_ANOTHER_LANE(simd_shuffle_up) OF_ANOTHER_LANE(simd_shuffle_rotate_down)
OF_ANOTHER_LANE(simd_shuffle_rotate_up) OF_ANOTHER_LANE(quad_shuffle) OF_ANOTHER_LANE(quad_broadcast)
OF_ANOTHER_LANE(quad_shuffle_xor) OF_ANOTHER_LANE(quad_shuffle_down) OF_ANOTHER_LANE(quad_shuffle_up)

template <class T>
T simd_shuffle_and_fill_down(T, T, ushort);
template <class T>
T simd_shuffle_and_fill_up(T, T, ushort);

struct simd_vote {
  using vote_t = uint64_t;
  explicit operator vote_t() const;
  bool any() const;
  bool all() const;
};

simd_vote simd_ballot(bool);
simd_vote simd_active_threads_mask();
bool simd_any(bool);
bool simd_all(bool);
bool simd_is_first();

template <class T, int Rows, int Columns>
struct simdgroup_matrix {
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T);
  vec<T, 2>& thread_elements();
  const vec<T, 2>& thread_elements() const;
};

using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <class T, int Rows, int Columns>
simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T);

#define MATRIX_IN(space)                                                                                     \
  template <class T>                                                                                         \
  void simdgroup_load(simdgroup_matrix<T, 8, 8>&, const space T*, ulong = 8, vec<ulong, 2> = 0,              \
                      bool transposed = false);                                                              \
  template <class T>                                                                                         \
  void simdgroup_store(const simdgroup_matrix<T, 8, 8>&, space T*, ulong = 8, vec<ulong, 2> = 0,             \
                       bool transposed = false);

MATRIX_IN(device)
MATRIX_IN(threadgroup)

template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>&, const simdgroup_matrix<A, 8, 8>&,
                                   const simdgroup_matrix<B, 8, 8>&, const simdgroup_matrix<C, 8, 8>&);
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D, 8, 8>&, const simdgroup_matrix<A, 8, 8>&,
                        const simdgroup_matrix<B, 8, 8>&);

// ---- Atomics.

enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  T value;
};

using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;
using atomic_bool = atomic<bool>;
using atomic_ulong = atomic<ulong>;

#define FETCH_IN(space, name)                                                                                \
  template <class T>                                                                                         \
  T name(volatile space atomic<T>*, as_given_t<T>, memory_order);

#define ATOMICS_IN(space)                                                                                    \
  template <class T>                                                                                         \
  T atomic_load_explicit(const volatile space atomic<T>*, memory_order);                                     \
  template <class T>                                                                                         \
  void atomic_store_explicit(volatile space atomic<T>*, as_given_t<T>, memory_order);                        \
  template <class T>                                                                                         \
  bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>*, T*, as_given_t<T>, memory_order,     \
                                             memory_order);                                                  \
  FETCH_IN(space, atomic_exchange_explicit)                                                                  \
  FETCH_IN(space, atomic_fetch_add_explicit)                                                                 \
  FETCH_IN(space, atomic_fetch_sub_explicit)                                                                 \
  FETCH_IN(space, atomic_fetch_max_explicit)                                                                 \
  FETCH_IN(space, atomic_fetch_min_explicit)                                                                 \
  FETCH_IN(space, atomic_fetch_and_explicit)                                                                 \
  FETCH_IN(space, atomic_fetch_or_explicit)                                                                  \
  FETCH_IN(space, atomic_fetch_xor_explicit)

ATOMICS_IN(device)
ATOMICS_IN(threadgroup)

}  // namespace metal

using namespace metal;

#include "mlx.h"
