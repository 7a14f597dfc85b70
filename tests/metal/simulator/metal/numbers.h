// Metal's number types: half, bfloat, and vectors of two, three and four.
#pragma once
#include <cfloat>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using half = _Float16;

// bfloat converts to float by itself; nothing of floating type converts to bfloat without a cast. That is
// the language's rule, and a kernel that breaks it would compile only here. Each operation rounds to nearest
// even.
struct bfloat {
  uint16_t bits;

  bfloat() = default;

  template <std::integral I>
  constexpr bfloat(I x) : bits(round(static_cast<float>(x))) {}

  template <class F>
    requires(std::is_floating_point_v<F> || std::is_same_v<F, half>)
  constexpr explicit bfloat(F x) : bits(round(static_cast<float>(x))) {}

  constexpr operator float() const { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

  static constexpr uint16_t round(float x) {
    uint32_t word = __builtin_bit_cast(uint32_t, x);
    if (x != x) return static_cast<uint16_t>(word >> 16 | 0x40);  // quiet, whichever half held its payload
    return static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
  }

  static constexpr bfloat of_bits(uint16_t bits) {
    bfloat x(0);
    x.bits = bits;
    return x;
  }
};

#define SIMULATOR_BFLOAT_OPERATOR(op)                                                       \
  constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); } \
  template <std::integral I>                                                                \
  constexpr bfloat operator op(bfloat a, I b) {                                             \
    return a op bfloat(b);                                                                  \
  }                                                                                         \
  template <std::integral I>                                                                \
  constexpr bfloat operator op(I a, bfloat b) {                                             \
    return bfloat(a) op b;                                                                  \
  }                                                                                         \
  constexpr bfloat& operator op##=(bfloat& a, bfloat b) { return a = a op b; }

SIMULATOR_BFLOAT_OPERATOR(+)
SIMULATOR_BFLOAT_OPERATOR(-)
SIMULATOR_BFLOAT_OPERATOR(*)
SIMULATOR_BFLOAT_OPERATOR(/)

constexpr bfloat operator-(bfloat x) { return bfloat::of_bits(x.bits ^ 0x8000); }

using float16_t = half;
using bfloat16_t = bfloat;

// Without the suffix a literal is a float already: the compiler is told so, Metal has no double.
constexpr half operator""h(long double x) { return static_cast<half>(x); }
constexpr half operator""H(long double x) { return static_cast<half>(x); }
constexpr bfloat operator""bf(long double x) { return bfloat(static_cast<float>(x)); }
constexpr bfloat operator""BF(long double x) { return bfloat(static_cast<float>(x)); }

// ---- Vectors. One of three takes the room of four, and all are aligned to their size.

template <class T, int N>
struct vec;

template <class T, int N>
struct VectorMembers;

template <class T>
struct VectorMembers<T, 2> {
  union {
    T elements[2];
    struct { T x, y; };
    struct { T r, g; };
  };
};

template <class T>
struct VectorMembers<T, 3> {
  union {
    T elements[3];
    struct { T x, y, z; };
    struct { T r, g, b; };
    vec<T, 2> xy;
  };
};

template <class T>
struct VectorMembers<T, 4> {
  union {
    T elements[4];
    struct { T x, y, z, w; };
    struct { T r, g, b, a; };
    struct { vec<T, 2> xy, zw; };
    vec<T, 3> xyz;
  };
};

template <class T, int N>
struct alignas(N == 2 ? 2 * sizeof(T) : 4 * sizeof(T)) vec : VectorMembers<T, N> {
  using element_type = T;

  vec() = default;

  // A scalar spreads over the vector by itself.
  template <class S>
    requires(std::is_convertible_v<S, T>)
  vec(S scalar) {
    for (int i = 0; i < N; i++) this->elements[i] = static_cast<T>(scalar);
  }

  // Another element type needs a cast.
  template <class U>
    requires(!std::is_same_v<U, T>)
  explicit vec(const vec<U, N>& other) {
    for (int i = 0; i < N; i++) this->elements[i] = static_cast<T>(other[i]);
  }

  // Scalars and shorter vectors, one after the other.
  template <class... Parts>
    requires(sizeof...(Parts) > 1)
  vec(Parts... parts) {
    static_assert((width<Parts>() + ...) == N, "a vector needs as many numbers as it has elements");
    int filled = 0;
    (append(filled, parts), ...);
  }

  T& operator[](int i) { return this->elements[i]; }
  const T& operator[](int i) const { return this->elements[i]; }

 private:
  template <class P>
  static constexpr int width() {
    if constexpr (requires { typename P::element_type; })
      return sizeof(P::elements) / sizeof(typename P::element_type);
    else
      return 1;
  }

  template <class P>
  void append(int& filled, const P& part) {
    if constexpr (requires { typename P::element_type; })
      for (int i = 0; i < width<P>(); i++) this->elements[filled++] = static_cast<T>(part[i]);
    else
      this->elements[filled++] = static_cast<T>(part);
  }
};

// A scalar operand takes the vector's element type, on either side.
#define SIMULATOR_VECTOR_OPERATOR(op, Result)                                  \
  template <class T, int N>                                                    \
  vec<Result, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {         \
    vec<Result, N> result;                                                     \
    for (int i = 0; i < N; i++) result[i] = static_cast<Result>(a[i] op b[i]); \
    return result;                                                             \
  }                                                                            \
  template <class T, int N>                                                    \
  vec<Result, N> operator op(const vec<T, N>& a, std::type_identity_t<T> b) {  \
    return a op vec<T, N>(b);                                                  \
  }                                                                            \
  template <class T, int N>                                                    \
  vec<Result, N> operator op(std::type_identity_t<T> a, const vec<T, N>& b) {  \
    return vec<T, N>(a) op b;                                                  \
  }

#define SIMULATOR_VECTOR_ARITHMETIC(op)                                                \
  SIMULATOR_VECTOR_OPERATOR(op, T)                                                     \
  template <class T, int N>                                                            \
  vec<T, N>& operator op##=(vec<T, N>& a, const std::type_identity_t<vec<T, N>>& b) {  \
    return a = a op b;                                                                 \
  }

SIMULATOR_VECTOR_ARITHMETIC(+)
SIMULATOR_VECTOR_ARITHMETIC(-)
SIMULATOR_VECTOR_ARITHMETIC(*)
SIMULATOR_VECTOR_ARITHMETIC(/)
SIMULATOR_VECTOR_ARITHMETIC(%)
SIMULATOR_VECTOR_ARITHMETIC(&)
SIMULATOR_VECTOR_ARITHMETIC(|)
SIMULATOR_VECTOR_ARITHMETIC(^)
SIMULATOR_VECTOR_ARITHMETIC(<<)
SIMULATOR_VECTOR_ARITHMETIC(>>)
SIMULATOR_VECTOR_OPERATOR(==, bool)
SIMULATOR_VECTOR_OPERATOR(!=, bool)
SIMULATOR_VECTOR_OPERATOR(<, bool)
SIMULATOR_VECTOR_OPERATOR(<=, bool)
SIMULATOR_VECTOR_OPERATOR(>, bool)
SIMULATOR_VECTOR_OPERATOR(>=, bool)
SIMULATOR_VECTOR_OPERATOR(&&, bool)
SIMULATOR_VECTOR_OPERATOR(||, bool)

#define SIMULATOR_VECTOR_PREFIX(op)                             \
  template <class T, int N>                                     \
  vec<T, N> operator op(vec<T, N> a) {                          \
    for (int i = 0; i < N; i++) a[i] = static_cast<T>(op a[i]); \
    return a;                                                   \
  }

SIMULATOR_VECTOR_PREFIX(-)
SIMULATOR_VECTOR_PREFIX(~)
SIMULATOR_VECTOR_PREFIX(!)

#define SIMULATOR_VECTOR_NAMES(T) \
  using T##2 = vec<T, 2>;         \
  using T##3 = vec<T, 3>;         \
  using T##4 = vec<T, 4>;

SIMULATOR_VECTOR_NAMES(float)
SIMULATOR_VECTOR_NAMES(half)
SIMULATOR_VECTOR_NAMES(bfloat)
SIMULATOR_VECTOR_NAMES(bool)
SIMULATOR_VECTOR_NAMES(char)
SIMULATOR_VECTOR_NAMES(uchar)
SIMULATOR_VECTOR_NAMES(short)
SIMULATOR_VECTOR_NAMES(ushort)
SIMULATOR_VECTOR_NAMES(int)
SIMULATOR_VECTOR_NAMES(uint)
SIMULATOR_VECTOR_NAMES(long)
SIMULATOR_VECTOR_NAMES(ulong)

template <class To, class From>
To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To result;
  memcpy(&result, &x, sizeof result);
  return result;
}

// ---- What generic code asks of them.

namespace metal {

using ::as_type;
using ::vec;
using std::bool_constant;
using std::conditional_t;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_convertible_v;
using std::is_integral;
using std::is_integral_v;
using std::is_same;
using std::is_same_v;
using std::is_signed_v;
using std::is_unsigned_v;
using std::make_signed_t;
using std::make_unsigned_t;
using std::numeric_limits;
using std::remove_const_t;
using std::remove_cv_t;
using std::remove_reference_t;
using std::true_type;

template <class T>
using remove_addrspace_t = T;

template <class T>
constexpr bool is_floating_point_v =
    std::is_same_v<T, float> || std::is_same_v<T, half> || std::is_same_v<T, bfloat>;

template <class T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};

template <class T>
constexpr bool is_arithmetic_v = is_floating_point_v<T> || std::is_integral_v<T>;

}  // namespace metal

template <>
struct std::numeric_limits<half> {
  static constexpr bool is_specialized = true;
  static constexpr int digits = 11;
  static constexpr half min() { return half(0x1p-14f); }
  static constexpr half max() { return half(65504.0f); }
  static constexpr half lowest() { return half(-65504.0f); }
  static constexpr half epsilon() { return half(0x1p-10f); }
  static constexpr half infinity() { return half(__builtin_inff()); }
  static constexpr half quiet_NaN() { return half(__builtin_nanf("")); }
};

template <>
struct std::numeric_limits<bfloat> {
  static constexpr bool is_specialized = true;
  static constexpr int digits = 8;
  static constexpr bfloat min() { return bfloat::of_bits(0x0080); }
  static constexpr bfloat max() { return bfloat::of_bits(0x7F7F); }
  static constexpr bfloat lowest() { return bfloat::of_bits(0xFF7F); }
  static constexpr bfloat epsilon() { return bfloat::of_bits(0x3C00); }
  static constexpr bfloat infinity() { return bfloat::of_bits(0x7F80); }
  static constexpr bfloat quiet_NaN() { return bfloat::of_bits(0x7FC0); }
};
