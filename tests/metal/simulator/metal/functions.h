// Metal's mathematical and integer functions. `metal::precise` and `metal::fast` are the same functions here:
// how far a GPU's fast ones are off is not simulated.
#pragma once
#include "numbers.h"

namespace metal {

// A function of float, for the other floating types through float, and for vectors element by element. There
// is none for integers: a call with one is as ambiguous here as it is for Metal's compiler.
#define SIMULATOR_UNARY(name, formula)                            \
  inline float name(float x) { return formula; }                  \
  inline half name(half x) { return half(name(float(x))); }       \
  inline bfloat name(bfloat x) { return bfloat(name(float(x))); } \
  template <class T, int N>                                       \
  vec<T, N> name(vec<T, N> x) {                                   \
    for (int i = 0; i < N; i++) x[i] = name(x[i]);                \
    return x;                                                     \
  }

#define SIMULATOR_BINARY(name, formula)                                               \
  inline float name(float x, float y) { return formula; }                             \
  inline half name(half x, half y) { return half(name(float(x), float(y))); }         \
  inline bfloat name(bfloat x, bfloat y) { return bfloat(name(float(x), float(y))); } \
  template <class T, int N>                                                           \
  vec<T, N> name(vec<T, N> x, const std::type_identity_t<vec<T, N>>& y) {             \
    for (int i = 0; i < N; i++) x[i] = name(x[i], y[i]);                              \
    return x;                                                                         \
  }

#define SIMULATOR_TERNARY(name, formula)                                                                  \
  inline float name(float x, float y, float z) { return formula; }                                        \
  inline half name(half x, half y, half z) { return half(name(float(x), float(y), float(z))); }           \
  inline bfloat name(bfloat x, bfloat y, bfloat z) { return bfloat(name(float(x), float(y), float(z))); } \
  template <class T, int N>                                                                               \
  vec<T, N> name(vec<T, N> x, const std::type_identity_t<vec<T, N>>& y,                                   \
                 const std::type_identity_t<vec<T, N>>& z) {                                              \
    for (int i = 0; i < N; i++) x[i] = name(x[i], y[i], z[i]);                                            \
    return x;                                                                                             \
  }

constexpr float SIMULATOR_PI = 3.14159265f;

SIMULATOR_UNARY(acos, __builtin_acosf(x))
SIMULATOR_UNARY(acosh, __builtin_acoshf(x))
SIMULATOR_UNARY(asin, __builtin_asinf(x))
SIMULATOR_UNARY(asinh, __builtin_asinhf(x))
SIMULATOR_UNARY(atan, __builtin_atanf(x))
SIMULATOR_UNARY(atanh, __builtin_atanhf(x))
SIMULATOR_UNARY(ceil, __builtin_ceilf(x))
SIMULATOR_UNARY(cos, __builtin_cosf(x))
SIMULATOR_UNARY(cosh, __builtin_coshf(x))
SIMULATOR_UNARY(cospi, __builtin_cosf(SIMULATOR_PI * x))
SIMULATOR_UNARY(exp, __builtin_expf(x))
SIMULATOR_UNARY(exp2, __builtin_exp2f(x))
SIMULATOR_UNARY(exp10, __builtin_powf(10.0f, x))
SIMULATOR_UNARY(fabs, __builtin_fabsf(x))
SIMULATOR_UNARY(floor, __builtin_floorf(x))
SIMULATOR_UNARY(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
SIMULATOR_UNARY(log, __builtin_logf(x))
SIMULATOR_UNARY(log2, __builtin_log2f(x))
SIMULATOR_UNARY(log10, __builtin_log10f(x))
SIMULATOR_UNARY(rint, __builtin_rintf(x))
SIMULATOR_UNARY(round, __builtin_roundf(x))
SIMULATOR_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))
SIMULATOR_UNARY(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
SIMULATOR_UNARY(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? x : 0.0f)
SIMULATOR_UNARY(sin, __builtin_sinf(x))
SIMULATOR_UNARY(sinh, __builtin_sinhf(x))
SIMULATOR_UNARY(sinpi, __builtin_sinf(SIMULATOR_PI * x))
SIMULATOR_UNARY(sqrt, __builtin_sqrtf(x))
SIMULATOR_UNARY(tan, __builtin_tanf(x))
SIMULATOR_UNARY(tanh, __builtin_tanhf(x))
SIMULATOR_UNARY(trunc, __builtin_truncf(x))
SIMULATOR_BINARY(atan2, __builtin_atan2f(x, y))
SIMULATOR_BINARY(copysign, __builtin_copysignf(x, y))
SIMULATOR_BINARY(divide, x / y)
SIMULATOR_BINARY(fdim, __builtin_fdimf(x, y))
SIMULATOR_BINARY(fmax, __builtin_fmaxf(x, y))
SIMULATOR_BINARY(fmin, __builtin_fminf(x, y))
SIMULATOR_BINARY(fmod, __builtin_fmodf(x, y))
SIMULATOR_BINARY(pow, __builtin_powf(x, y))
SIMULATOR_BINARY(powr, __builtin_powf(x, y))
SIMULATOR_BINARY(step, y < x ? 0.0f : 1.0f)
SIMULATOR_TERNARY(fma, __builtin_fmaf(x, y, z))
SIMULATOR_TERNARY(mix, x + (y - x) * z)

// ---- For integers, too. Arguments of two types are an error, as overloads make them for Metal.

template <class T>
concept Integer = std::is_integral_v<T> && !std::is_same_v<T, bool>;

#define SIMULATOR_EXTREME(name, of_floats, comparison) \
  SIMULATOR_BINARY(name, of_floats(x, y))              \
  template <Integer T>                                 \
  T name(T x, T y) {                                   \
    return y comparison x ? y : x;                     \
  }

SIMULATOR_EXTREME(max, __builtin_fmaxf, >)
SIMULATOR_EXTREME(min, __builtin_fminf, <)
SIMULATOR_TERNARY(clamp, __builtin_fminf(__builtin_fmaxf(x, y), z))
SIMULATOR_UNARY(abs, __builtin_fabsf(x))

template <Integer T>
T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}

template <Integer T>
T abs(T x) {
  return x < 0 ? static_cast<T>(-x) : x;
}

template <class T>
T max3(T a, T b, T c) {
  return max(a, max(b, c));
}

template <class T>
T min3(T a, T b, T c) {
  return min(a, min(b, c));
}

template <Integer T>
T absdiff(T a, T b) {
  return a < b ? b - a : a - b;
}

template <Integer T>
T mulhi(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> 8 * sizeof(T));
}

template <Integer T>
T popcount(T x) {
  return static_cast<T>(__builtin_popcountl(static_cast<std::make_unsigned_t<T>>(x)));
}

template <Integer T>
T clz(T x) {
  constexpr int bits = 8 * sizeof(T);
  auto value = static_cast<uint64_t>(static_cast<std::make_unsigned_t<T>>(x));
  return static_cast<T>(value ? __builtin_clzl(value) - (64 - bits) : bits);
}

template <Integer T>
T ctz(T x) {
  return static_cast<T>(x ? __builtin_ctzl(static_cast<std::make_unsigned_t<T>>(x)) : 8 * sizeof(T));
}

template <Integer T>
T rotate(T x, T by) {
  constexpr int bits = 8 * sizeof(T);
  auto value = static_cast<std::make_unsigned_t<T>>(x);
  int left = static_cast<int>(by) & (bits - 1);
  return static_cast<T>(left ? value << left | value >> (bits - left) : value);
}

template <Integer T>
T reverse_bits(T x) {
  T result = 0;
  for (int bit = 0; bit < 8 * static_cast<int>(sizeof(T)); bit++)
    result |= (x >> bit & 1) << (8 * sizeof(T) - 1 - bit);
  return result;
}

template <Integer T>
T extract_bits(T x, uint offset, uint bits) {
  if (!bits) return 0;
  return static_cast<T>(static_cast<T>(x << (8 * sizeof(T) - offset - bits)) >> (8 * sizeof(T) - bits));
}

template <Integer T>
T insert_bits(T base, T insert, uint offset, uint bits) {
  T mask = static_cast<T>((bits < 8 * sizeof(T) ? (T(1) << bits) - 1 : ~T(0)) << offset);
  return static_cast<T>((base & ~mask) | (insert << offset & mask));
}

inline int mad24(int a, int b, int c) { return a * b + c; }
inline uint mad24(uint a, uint b, uint c) { return a * b + c; }
inline int mul24(int a, int b) { return a * b; }
inline uint mul24(uint a, uint b) { return a * b; }

// ---- Questions.

inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isnormal(float x) { return __builtin_isnormal(x); }
inline bool signbit(float x) { return __builtin_signbit(x); }

template <class T>
T select(T otherwise, T chosen, bool condition) {
  return condition ? chosen : otherwise;
}

template <class T, int N>
vec<T, N> select(vec<T, N> otherwise, const vec<T, N>& chosen, const vec<bool, N>& condition) {
  for (int i = 0; i < N; i++)
    if (condition[i]) otherwise[i] = chosen[i];
  return otherwise;
}

template <int N>
bool any(const vec<bool, N>& x) {
  for (int i = 0; i < N; i++)
    if (x[i]) return true;
  return false;
}

template <int N>
bool all(const vec<bool, N>& x) {
  for (int i = 0; i < N; i++)
    if (!x[i]) return false;
  return true;
}

// ---- Geometry.

template <class T, int N>
T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum = sum + a[i] * b[i];
  return sum;
}

template <class T, int N>
T length_squared(const vec<T, N>& x) {
  return dot(x, x);
}

template <class T, int N>
T length(const vec<T, N>& x) {
  return sqrt(dot(x, x));
}

namespace precise {
using namespace metal;
}

namespace fast {
using namespace metal;
}

}  // namespace metal
