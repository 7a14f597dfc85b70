// Operations of a whole simdgroup: reductions, scans, shuffles, votes and 8x8 matrices.
//
// Each waits until all lanes have brought their operand; then it is computed once for all of them.
#pragma once
#include "functions.h"
#include "scheduler.h"

namespace simulator {

// Run Operation::complete over what all lanes of the simdgroup bring. It may change the operands.
template <class Operation, class Operand>
void collect(Operand& operand, Site at) {
  static constexpr Collective collective{Operation::name, Operation::complete};
  wait(Wait::simdgroup, at, &collective, &operand);
}

template <class Operand>
Operand& operand_of(Simdgroup& simdgroup, uint32_t lane) {
  return *static_cast<Operand*>(simdgroup.operands[lane]);
}

// Names an operation as a type, for `collect`.
#define SIMULATOR_OPERATION static constexpr const char* name

// Hardware exchanges at most 32 bits at once, and booleans not at all.
template <class T>
struct Element {
  using type = T;
};

template <class T, int N>
struct Element<vec<T, N>> {
  using type = T;
};

template <class T>
constexpr void check_exchangeable() {
  using E = typename Element<T>::type;
  static_assert(metal::is_arithmetic_v<E> && sizeof(E) <= 4 && !std::is_same_v<E, bool>,
                "a simdgroup exchanges numbers of at most 32 bits, and no bool");
}

// ---- Reductions and scans. Sums of half and bfloat are rounded once, from float.

template <class T>
struct Accumulator {
  using type = T;
};

template <>
struct Accumulator<half> {
  using type = float;
};

template <>
struct Accumulator<bfloat> {
  using type = float;
};

template <class T, int N>
struct Accumulator<vec<T, N>> {
  using type = vec<typename Accumulator<T>::type, N>;
};

#define SIMULATOR_FOLD(Name, title, formula)                    \
  template <class T>                                            \
  struct Name {                                                 \
    SIMULATOR_OPERATION = title;                                \
    static T fold(T a, T b) { return static_cast<T>(formula); } \
  };

SIMULATOR_FOLD(Sum, "simd_sum", a + b)
SIMULATOR_FOLD(Product, "simd_product", a * b)
SIMULATOR_FOLD(Maximum, "simd_max", metal::max(a, b))
SIMULATOR_FOLD(Minimum, "simd_min", metal::min(a, b))
SIMULATOR_FOLD(And, "simd_and", a & b)
SIMULATOR_FOLD(Or, "simd_or", a | b)
SIMULATOR_FOLD(Xor, "simd_xor", a ^ b)

// Every lane gets the fold of its `width` neighbours: the simdgroup, or a quad.
template <template <class> class Fold, class T, uint32_t width>
struct Reduce {
  using A = typename Accumulator<T>::type;
  SIMULATOR_OPERATION = Fold<A>::name;

  static void complete_part(Simdgroup& simdgroup, uint32_t first) {
    uint32_t end = least(first + width, simdgroup.count);
    A total = static_cast<A>(operand_of<T>(simdgroup, first));
    for (uint32_t i = first + 1; i < end; i++)
      total = Fold<A>::fold(total, static_cast<A>(operand_of<T>(simdgroup, i)));
    for (uint32_t i = first; i < end; i++) operand_of<T>(simdgroup, i) = static_cast<T>(total);
  }

  static void complete(Simdgroup& simdgroup, Site) {
    for (uint32_t first = 0; first < simdgroup.count; first += width) complete_part(simdgroup, first);
  }
};

template <template <class> class Fold, class T, bool inclusive>
struct Scan {
  using A = typename Accumulator<T>::type;
  SIMULATOR_OPERATION = inclusive ? "simd_prefix_inclusive" : "simd_prefix_exclusive";

  static void complete(Simdgroup& simdgroup, Site) {
    A before = static_cast<A>(T(std::is_same_v<Fold<A>, Product<A>> ? 1 : 0));
    for (uint32_t i = 0; i < simdgroup.count; i++) {
      T& operand = operand_of<T>(simdgroup, i);
      A through = Fold<A>::fold(before, static_cast<A>(operand));
      operand = static_cast<T>(inclusive ? through : before);
      before = through;
    }
  }
};

// ---- Shuffles: a lane names the lane that it reads. Reading one that does not run is undefined in Metal.

constexpr int OWN = -1;

template <class T>
struct Read {
  T value, result;
  int from;  // a lane, or OWN
};

template <class T>
struct Shuffle {
  SIMULATOR_OPERATION = "simd_shuffle";

  static void complete(Simdgroup& simdgroup, Site at) {
    for (uint32_t i = 0; i < simdgroup.count; i++) {
      Read<T>& read = operand_of<Read<T>>(simdgroup, i);
      int from = read.from == OWN ? static_cast<int>(i) : read.from;
      if (from < 0 || from >= static_cast<int>(simdgroup.count))
        return fail(at, "lane %u of a simdgroup of %u reads lane %d, which does not run", i, simdgroup.count,
                    from);
      read.result = operand_of<Read<T>>(simdgroup, static_cast<uint32_t>(from)).value;
    }
  }
};

template <class T>
T shuffle(T value, int from, Site at) {
  Read<T> read{value, value, from};
  collect<Shuffle<T>>(read, at);
  return read.result;
}

// ---- Votes and barriers.

struct Vote {
  bool mine;
  uint64_t all;  // a bit a lane
  uint32_t lanes;
};

struct Ballot {
  SIMULATOR_OPERATION = "simd_ballot";

  static void complete(Simdgroup& simdgroup, Site) {
    uint64_t all = 0;
    for (uint32_t i = 0; i < simdgroup.count; i++) all |= uint64_t(operand_of<Vote>(simdgroup, i).mine) << i;
    for (uint32_t i = 0; i < simdgroup.count; i++) {
      operand_of<Vote>(simdgroup, i).all = all;
      operand_of<Vote>(simdgroup, i).lanes = simdgroup.count;
    }
  }
};

inline Vote vote(bool mine, Site at) {
  Vote result{mine, 0, 0};
  collect<Ballot>(result, at);
  return result;
}

struct Meet {
  SIMULATOR_OPERATION = "simdgroup_barrier";

  static void complete(Simdgroup& simdgroup, Site) { simdgroup_barriers[simdgroup.first / SIMD_WIDTH]++; }
};

}  // namespace simulator

// ---- The language's names.

namespace metal {

using simulator::Site;

enum class mem_flags : uint32_t { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };

constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<uint32_t>(a) | static_cast<uint32_t>(b));
}

inline void threadgroup_barrier(mem_flags flags, Site at = Site::current()) {
  void* fence = simulator::fence_of_group();
  bool orders = flags != mem_flags::mem_none;
  if (orders) simulator::release(fence);
  simulator::wait(simulator::Wait::threadgroup, at);
  if (orders) simulator::acquire(fence);
}

inline void simdgroup_barrier(mem_flags flags, Site at = Site::current()) {
  void* fence = simulator::fence_of_simdgroup();
  bool orders = flags != mem_flags::mem_none;
  if (orders) simulator::release(fence);
  int nothing = 0;
  simulator::collect<simulator::Meet>(nothing, at);
  if (orders) simulator::acquire(fence);
}

#define SIMULATOR_REDUCTION(name, Fold, width)                               \
  template <class T>                                                         \
  T name(T x, Site at = Site::current()) {                                   \
    simulator::check_exchangeable<T>();                                      \
    simulator::collect<simulator::Reduce<simulator::Fold, T, width>>(x, at); \
    return x;                                                                \
  }

SIMULATOR_REDUCTION(simd_sum, Sum, 32)
SIMULATOR_REDUCTION(simd_product, Product, 32)
SIMULATOR_REDUCTION(simd_max, Maximum, 32)
SIMULATOR_REDUCTION(simd_min, Minimum, 32)
SIMULATOR_REDUCTION(simd_and, And, 32)
SIMULATOR_REDUCTION(simd_or, Or, 32)
SIMULATOR_REDUCTION(simd_xor, Xor, 32)
SIMULATOR_REDUCTION(quad_sum, Sum, 4)
SIMULATOR_REDUCTION(quad_product, Product, 4)
SIMULATOR_REDUCTION(quad_max, Maximum, 4)
SIMULATOR_REDUCTION(quad_min, Minimum, 4)

#define SIMULATOR_SCAN(name, Fold, inclusive)                                  \
  template <class T>                                                           \
  T name(T x, Site at = Site::current()) {                                     \
    simulator::check_exchangeable<T>();                                        \
    simulator::collect<simulator::Scan<simulator::Fold, T, inclusive>>(x, at); \
    return x;                                                                  \
  }

SIMULATOR_SCAN(simd_prefix_inclusive_sum, Sum, true)
SIMULATOR_SCAN(simd_prefix_exclusive_sum, Sum, false)
SIMULATOR_SCAN(simd_prefix_inclusive_product, Product, true)
SIMULATOR_SCAN(simd_prefix_exclusive_product, Product, false)

// `lane` is the caller's own; lanes past an end keep their value or take the filling, as documented.
#define SIMULATOR_SHUFFLE(name, from)                            \
  template <class T>                                             \
  T name(T x, ushort by, Site at = Site::current()) {            \
    simulator::check_exchangeable<T>();                          \
    int lane = static_cast<int>(simulator::lane_in_simdgroup()); \
    return simulator::shuffle(x, from, at);                      \
  }

SIMULATOR_SHUFFLE(simd_shuffle, (static_cast<void>(lane), by))
SIMULATOR_SHUFFLE(simd_broadcast, (static_cast<void>(lane), by))
SIMULATOR_SHUFFLE(simd_shuffle_xor, lane ^ by)
SIMULATOR_SHUFFLE(simd_shuffle_down, lane + by < 32 ? lane + by : simulator::OWN)
SIMULATOR_SHUFFLE(simd_shuffle_up, lane >= by ? lane - by : simulator::OWN)
SIMULATOR_SHUFFLE(simd_shuffle_rotate_down, (lane + by) % 32)
SIMULATOR_SHUFFLE(simd_shuffle_rotate_up, (lane - by % 32 + 32) % 32)
SIMULATOR_SHUFFLE(quad_shuffle, (lane & ~3) + by)
SIMULATOR_SHUFFLE(quad_broadcast, (lane & ~3) + by)
SIMULATOR_SHUFFLE(quad_shuffle_xor, lane ^ (by & 3))
SIMULATOR_SHUFFLE(quad_shuffle_down, (lane & 3) + by < 4 ? lane + by : simulator::OWN)
SIMULATOR_SHUFFLE(quad_shuffle_up, (lane & 3) >= by ? lane - by : simulator::OWN)

template <class T>
T simd_broadcast_first(T x, Site at = Site::current()) {
  return simd_broadcast(x, 0, at);
}

template <class T>
T simd_shuffle_and_fill_down(T x, T filling, ushort by, Site at = Site::current()) {
  T moved = simd_shuffle_rotate_down(x, by, at), fill = simd_shuffle_rotate_down(filling, by, at);
  return simulator::lane_in_simdgroup() + by < 32 ? moved : fill;
}

template <class T>
T simd_shuffle_and_fill_up(T x, T filling, ushort by, Site at = Site::current()) {
  T moved = simd_shuffle_rotate_up(x, by, at), fill = simd_shuffle_rotate_up(filling, by, at);
  return simulator::lane_in_simdgroup() >= by ? moved : fill;
}

struct simd_vote {
  using vote_t = uint64_t;
  uint64_t bits;
  uint32_t lanes;

  explicit operator vote_t() const { return bits; }
  bool any() const { return bits != 0; }
  bool all() const { return bits == (lanes < 64 ? (uint64_t(1) << lanes) - 1 : ~uint64_t(0)); }
};

inline simd_vote simd_ballot(bool x, Site at = Site::current()) {
  simulator::Vote vote = simulator::vote(x, at);
  return {vote.all, vote.lanes};
}

inline bool simd_any(bool x, Site at = Site::current()) { return simd_ballot(x, at).any(); }
inline bool simd_all(bool x, Site at = Site::current()) { return simd_ballot(x, at).all(); }
inline simd_vote simd_active_threads_mask(Site at = Site::current()) { return simd_ballot(true, at); }
inline bool simd_is_first(Site at = Site::current()) {
  simd_ballot(true, at);
  return simulator::lane_in_simdgroup() == 0;
}

// ---- 8x8 matrices. A lane holds two neighbours of one row, in the places where Apple's GPUs keep them and
// where MLX's own kernels expect them.

template <class T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8 && is_floating_point_v<T>, "matrices are 8x8, of a floating type");
  vec<T, 2> held;

  simdgroup_matrix() = default;

  // `diagonal` on the diagonal, zero elsewhere.
  explicit simdgroup_matrix(T diagonal) {
    int lane = static_cast<int>(simulator::lane_in_simdgroup());
    held = {row(lane) == column(lane) ? diagonal : T(0), row(lane) == column(lane) + 1 ? diagonal : T(0)};
  }

  vec<T, 2>& thread_elements() { return held; }
  const vec<T, 2>& thread_elements() const { return held; }

  static constexpr int row(int lane) { return (lane / 4 & 4) + lane / 2 % 4; }
  static constexpr int column(int lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
};

using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <class T, int Rows, int Columns>
simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Rows, Columns> matrix;
  matrix.held = {value, value};
  return matrix;
}

}  // namespace metal

namespace simulator {

// Matrix operations that exchange nothing, but that a whole simdgroup has to reach.
struct MoveMatrix {
  SIMULATOR_OPERATION = "simdgroup_load or simdgroup_store";

  static void complete(Simdgroup& simdgroup, Site at) {
    if (simdgroup.count != SIMD_WIDTH) fail(at, "%s with %u of 32 lanes", name, simdgroup.count);
  }
};

// Where element (row, column + i) of this lane lies, from the matrix's first in memory.
template <class T>
ulong place(int i, ulong stride, ulong2 origin, bool transposed) {
  using Matrix = metal::simdgroup_matrix<T, 8, 8>;
  int lane = static_cast<int>(lane_in_simdgroup());
  ulong row = Matrix::row(lane), column = Matrix::column(lane) + i;
  if (transposed) return (origin.y + column) * stride + origin.x + row;
  return (origin.y + row) * stride + origin.x + column;
}

template <class D, class A, class B, class C>
struct Multiplication {
  metal::simdgroup_matrix<D, 8, 8>* d;
  const metal::simdgroup_matrix<A, 8, 8>* a;
  const metal::simdgroup_matrix<B, 8, 8>* b;
  const metal::simdgroup_matrix<C, 8, 8>* c;
};

template <class D, class A, class B, class C>
struct Multiply {
  SIMULATOR_OPERATION = "simdgroup_multiply_accumulate";
  using Operand = Multiplication<D, A, B, C>;

  template <class T>
  static void gather(float (&whole)[8][8], const metal::simdgroup_matrix<T, 8, 8>& part, int lane) {
    float* place = &whole[part.row(lane)][part.column(lane)];
    place[0] = static_cast<float>(part.held.x);
    place[1] = static_cast<float>(part.held.y);
  }

  static void complete(Simdgroup& simdgroup, Site at) {
    if (simdgroup.count != SIMD_WIDTH) return fail(at, "%s with %u of 32 lanes", name, simdgroup.count);
    float a[8][8], b[8][8], sums[8][8];
    for (int lane = 0; lane < 32; lane++) {
      const Operand& operand = operand_of<Operand>(simdgroup, lane);
      gather(a, *operand.a, lane);
      gather(b, *operand.b, lane);
      gather(sums, *operand.c, lane);
    }
    for (int row = 0; row < 8; row++)
      for (int k = 0; k < 8; k++)
        for (int column = 0; column < 8; column++) sums[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; lane++) {
      auto& d = *operand_of<Operand>(simdgroup, lane).d;
      const float* place = &sums[d.row(lane)][d.column(lane)];
      d.held = {static_cast<D>(place[0]), static_cast<D>(place[1])};
    }
  }
};

}  // namespace simulator

namespace metal {

// Memory is touched before the lanes meet, so that a sanitizer blames the lane that does it.
template <class T>
void simdgroup_load(simdgroup_matrix<T, 8, 8>& matrix, const T* from, ulong stride = 8,
                    ulong2 origin = ulong2(0ul), bool transposed = false, Site at = Site::current()) {
  for (int i = 0; i < 2; i++) matrix.held[i] = from[simulator::place<T>(i, stride, origin, transposed)];
  simulator::collect<simulator::MoveMatrix>(matrix, at);
}

template <class T>
void simdgroup_store(const simdgroup_matrix<T, 8, 8>& matrix, T* to, ulong stride = 8,
                     ulong2 origin = ulong2(0ul), bool transposed = false, Site at = Site::current()) {
  for (int i = 0; i < 2; i++) to[simulator::place<T>(i, stride, origin, transposed)] = matrix.held[i];
  int nothing = 0;
  simulator::collect<simulator::MoveMatrix>(nothing, at);
}

template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c,
                                   Site at = Site::current()) {
  simulator::Multiplication<D, A, B, C> operand{&d, &a, &b, &c};
  simulator::collect<simulator::Multiply<D, A, B, C>>(operand, at);
}

template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                        const simdgroup_matrix<B, 8, 8>& b, Site at = Site::current()) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)), at);
}

}  // namespace metal
