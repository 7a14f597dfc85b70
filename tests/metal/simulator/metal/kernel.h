// Everything a translated kernel includes: the language, and what MLX puts before every kernel.
#pragma once
#include "atomics.h"
#include "simdgroup.h"

namespace simulator {

struct complex64 {
  float real, imag;
};

// ---- Attributes of a kernel's parameters, under the names that Metal gives them.

namespace attribute {

inline uint3 vector(const uint32_t (&x)[3]) { return {x[0], x[1], x[2]}; }

inline uint3 thread_position_in_threadgroup() { return vector(lanes[current].position); }
inline uint3 threadgroup_position_in_grid() { return vector(group.index); }
inline uint3 threads_per_threadgroup() { return vector(group.size); }
inline uint3 dispatch_threads_per_threadgroup() { return vector(launch.threadgroup); }
inline uint3 threads_per_grid() { return vector(launch.grid); }
inline uint3 grid_size() { return vector(launch.grid); }
inline uint3 grid_origin() { return {0u, 0u, 0u}; }

inline uint3 thread_position_in_grid() {
  return threadgroup_position_in_grid() * vector(launch.threadgroup) + thread_position_in_threadgroup();
}

inline uint3 threadgroups_per_grid() {
  return (vector(launch.grid) + vector(launch.threadgroup) - 1u) / vector(launch.threadgroup);
}

inline uint count(uint threads, uint width) { return (threads + width - 1) / width; }
inline uint dispatched() { return launch.threadgroup[0] * launch.threadgroup[1] * launch.threadgroup[2]; }

inline uint thread_index_in_threadgroup() { return current; }
inline uint thread_index_in_simdgroup() { return current % SIMD_WIDTH; }
inline uint simdgroup_index_in_threadgroup() { return current / SIMD_WIDTH; }
inline uint simdgroups_per_threadgroup() { return count(group.threads, SIMD_WIDTH); }
inline uint dispatch_simdgroups_per_threadgroup() { return count(dispatched(), SIMD_WIDTH); }
inline uint threads_per_simdgroup() { return SIMD_WIDTH; }
inline uint thread_execution_width() { return SIMD_WIDTH; }
inline uint thread_index_in_quadgroup() { return current % 4; }
inline uint quadgroup_index_in_threadgroup() { return current / 4; }
inline uint quadgroups_per_threadgroup() { return count(group.threads, 4); }
inline uint dispatch_quadgroups_per_threadgroup() { return count(dispatched(), 4); }

}  // namespace attribute
}  // namespace simulator

using complex64_t = simulator::complex64;
using namespace metal;

// ---- Keywords. Addresses have no spaces here; `threadgroup` variables have been rewritten before.

#define kernel
#define device
#define constant
#define thread
#define threadgroup
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define __HAVE_BFLOAT__ 1
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define M_PI_F 3.14159265f
#define M_LN2_F 0.693147181f
#define M_LOG2E_F 1.44269504f
#define M_SQRT1_2_F 0.707106781f
#define M_SQRT2_F 1.41421356f
#define M_2_SQRTPI_F 1.12837917f
#define HALF_MAX 65504.0h
#define MLX_MTL_PRAGMA_UNROLL

// ---- Helpers that MLX puts before every kernel, and 64-bit shuffles, which are its own.

#define SIMULATOR_WIDE_SHUFFLE(name, T)                        \
  inline T name(T x, ushort by, Site at = Site::current()) {   \
    return as_type<T>(metal::name(as_type<uint2>(x), by, at)); \
  }

SIMULATOR_WIDE_SHUFFLE(simd_shuffle, int64_t)
SIMULATOR_WIDE_SHUFFLE(simd_shuffle, uint64_t)
SIMULATOR_WIDE_SHUFFLE(simd_shuffle_down, int64_t)
SIMULATOR_WIDE_SHUFFLE(simd_shuffle_down, uint64_t)
SIMULATOR_WIDE_SHUFFLE(simd_shuffle_up, int64_t)
SIMULATOR_WIDE_SHUFFLE(simd_shuffle_up, uint64_t)

#include "mlx.h"
