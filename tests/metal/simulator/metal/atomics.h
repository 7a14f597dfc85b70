// Metal's atomics: relaxed, on 32-bit numbers. They order nothing, and ThreadSanitizer knows them as atomics.
#pragma once
#include "functions.h"

namespace metal {

enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, uint> || std::is_same_v<T, float> ||
                    std::is_same_v<T, bool> || std::is_same_v<T, ulong>,
                "atomics are of int, uint, float, bool or ulong");
  T value;
};

using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;
using atomic_bool = atomic<bool>;
using atomic_ulong = atomic<ulong>;

template <class T>
T atomic_load_explicit(const volatile atomic<T>* from, memory_order) {
  T value;
  __atomic_load(const_cast<T*>(&from->value), &value, __ATOMIC_RELAXED);
  return value;
}

template <class T>
void atomic_store_explicit(volatile atomic<T>* to, std::type_identity_t<T> value, memory_order) {
  __atomic_store(&to->value, &value, __ATOMIC_RELAXED);
}

template <class T>
T atomic_exchange_explicit(volatile atomic<T>* with, std::type_identity_t<T> value, memory_order) {
  T before;
  __atomic_exchange(&with->value, &value, &before, __ATOMIC_RELAXED);
  return before;
}

template <class T>
bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* with, T* expected,
                                           std::type_identity_t<T> desired, memory_order, memory_order) {
  return __atomic_compare_exchange(&with->value, expected, &desired, false, __ATOMIC_RELAXED,
                                   __ATOMIC_RELAXED);
}

// The value before, as `x`, and the operand, as `y`, make the value after.
#define SIMULATOR_FETCH(name, formula)                                                                \
  template <class T>                                                                                  \
  T name(volatile atomic<T>* with, std::type_identity_t<T> y, memory_order order) {                   \
    T x = atomic_load_explicit(with, order);                                                          \
    while (!atomic_compare_exchange_weak_explicit(with, &x, static_cast<T>(formula), order, order)) { \
    }                                                                                                 \
    return x;                                                                                         \
  }

SIMULATOR_FETCH(atomic_fetch_add_explicit, x + y)
SIMULATOR_FETCH(atomic_fetch_sub_explicit, x - y)
SIMULATOR_FETCH(atomic_fetch_max_explicit, max(x, y))
SIMULATOR_FETCH(atomic_fetch_min_explicit, min(x, y))
SIMULATOR_FETCH(atomic_fetch_and_explicit, x & y)
SIMULATOR_FETCH(atomic_fetch_or_explicit, x | y)
SIMULATOR_FETCH(atomic_fetch_xor_explicit, x ^ y)

}  // namespace metal
