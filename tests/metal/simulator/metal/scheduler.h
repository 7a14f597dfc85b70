// Runs a grid of Metal threads, here "lanes", one threadgroup after the other on one CPU thread.
//
// A lane runs until it waits: for its simdgroup at a collective operation, or for its threadgroup at a
// barrier. When every lane of the group waits or has returned, whoever is complete goes on. Complete means
// that all lanes wait in the same place of the source: hardware forgives some of what is an error here, but
// which of it is not written down anywhere.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <source_location>

#include "fiber.h"

namespace simulator {

constexpr uint32_t SIMD_WIDTH = 32;
constexpr uint32_t MOST_THREADS = 1024;   // of a threadgroup
constexpr size_t MOST_SHARED = 32 << 10;  // bytes of threadgroup memory
constexpr size_t MOST_VARIABLES = 256;    // in it
constexpr int POISON = 0xFF;              // in every byte: NaN for the floating types, -1 or the maximum else

using Site = std::source_location;

// Lanes [first, first + count) of the group, which all wait for the same collective.
struct Simdgroup {
  uint32_t first, count;
  void* operands[SIMD_WIDTH];
};

// `complete` runs once, when all lanes have arrived, and finds what they brought in `operands`.
struct Collective {
  const char* name;
  void (*complete)(Simdgroup&, Site);
};

enum class Wait { none, simdgroup, threadgroup, returned };

struct Lane {
  Fiber fiber;
  Wait wait;
  Site site;  // where it waits
  const Collective* collective;
  void* operand;
  uint32_t position[3];
};

enum class Order : int32_t { forward, backward, shuffled };

// What the host passes, and what it gets back; the ctypes structures in launch.py repeat their fields.
struct Launch {
  uint32_t grid[3], threadgroup[3];
  int32_t order;
  uint32_t seed;
};

struct Outcome {
  uint64_t groups, barriers, simd_ops, shared_bytes;
  int32_t line;
  char text[484];  // empty when all went well
};

struct Group {
  uint32_t index[3], size[3];  // groups at the far edges of the grid are smaller
  uint32_t threads;
  uint64_t serial;  // counts from 1
  uint64_t barriers;
};

// A threadgroup variable. Around it lie bytes that nobody may change; AddressSanitizer brings its own.
struct Shared {
  char* memory;
  size_t bytes;
  uint64_t serial;  // of the group that it was last prepared for
  Site site;        // of its declaration
};

inline uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

inline Lane lanes[MOST_THREADS];
inline uint32_t current;  // the lane that runs
inline Group group;
inline Launch launch;
inline Outcome outcome;
inline Shared shared_variables[MOST_VARIABLES];
inline void (*kernel_body)(void**);
inline void** kernel_buffers;

// ---- Errors: the first one stops the launch.

inline void fail(Site at, const char* format, ...) {
  if (outcome.text[0]) return;
  outcome.line = static_cast<int32_t>(at.line());
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(outcome.text, sizeof outcome.text, format, arguments);
  va_end(arguments);
}

inline bool failed() { return outcome.text[0]; }

// ---- What lanes call.

inline void wait(Wait kind, Site at, const Collective* collective = nullptr, void* operand = nullptr) {
  Lane& lane = lanes[current];
  {
    Unseen unseen;
    lane.wait = kind;
    lane.site = at;
    lane.collective = collective;
    lane.operand = operand;
  }
  leave(lane.fiber);
}

inline uint32_t lane_in_simdgroup() { return current % SIMD_WIDTH; }

#if defined(SIMULATOR_ADDRESS) || defined(SIMULATOR_THREAD)
constexpr size_t MARGIN = 0;
#else
constexpr size_t MARGIN = 256;
#endif

inline char* allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes + 2 * MARGIN)) abort();
  return static_cast<char*>(memory) + MARGIN;
}

// Also NaN, but not the one that comes out when a lane computes with poison.
inline void mark_margin(char* memory) {
  for (size_t i = 0; i < MARGIN; i++) memory[i] = static_cast<char>(i % 2 ? 0xFF : 0xA5);
}

inline bool is_marked(const char* memory) {
  for (size_t i = 0; i < MARGIN; i++)
    if (memory[i] != static_cast<char>(i % 2 ? 0xFF : 0xA5)) return false;
  return true;
}

inline void measure_shared(Site at) {
  size_t total = 0;
  for (const Shared& variable : shared_variables) total += (variable.bytes + 15) / 16 * 16;
  if (total > outcome.shared_bytes) outcome.shared_bytes = total;
  if (total > MOST_SHARED)
    fail(at, "threadgroup variables take %zu bytes, and a threadgroup has %zu", total, MOST_SHARED);
}

// Each variable is a block of its own, so that AddressSanitizer sees where it ends. For ThreadSanitizer it
// is a new one in each group: groups share nothing.
inline void prepare_shared(Shared& variable, size_t bytes, Site at) {
#ifdef SIMULATOR_THREAD
  variable.memory = allocate(bytes);
#else
  if (!variable.memory) variable.memory = allocate(bytes);
#endif
  memset(variable.memory, POISON, bytes);
  mark_margin(variable.memory - MARGIN);
  mark_margin(variable.memory + bytes);
  variable.bytes = bytes;
  variable.serial = group.serial;
  variable.site = at;
  measure_shared(at);
}

// After a group.
inline void check_margins() {
  for (const Shared& variable : shared_variables) {
    if (variable.serial != group.serial) continue;
    if (!is_marked(variable.memory - MARGIN) || !is_marked(variable.memory + variable.bytes))
      fail(variable.site, "lanes wrote outside this threadgroup variable of %zu bytes", variable.bytes);
  }
}

inline void* shared_memory(size_t number, size_t bytes, Site at) {
  Unseen unseen;
  if (number >= MOST_VARIABLES) abort();
  Shared& variable = shared_variables[number];
  if (variable.serial != group.serial) prepare_shared(variable, bytes, at);
  return variable.memory;
}

// The threadgroup variable `number` of a kernel, of type V.
template <class V>
V& shared(size_t number, Site at = Site::current()) {
  void* memory = shared_memory(number, sizeof(V), at);
  if (failed()) wait(Wait::returned, at);  // and nobody wakes it
  return *static_cast<V*>(memory);
}

// ---- Barriers order memory, which ThreadSanitizer must hear of. Two names take turns: with one, a lane that
// runs ahead to the next barrier would seem ordered before those that have not yet left this one.

inline uint64_t fences[1024][2 + 2 * MOST_THREADS / SIMD_WIDTH];

inline void* fence_of_group() { return &fences[group.serial % 1024][group.barriers % 2]; }

inline uint64_t simdgroup_barriers[MOST_THREADS / SIMD_WIDTH];

inline void* fence_of_simdgroup() {
  uint32_t simdgroup = current / SIMD_WIDTH;
  return &fences[group.serial % 1024][2 + 2 * simdgroup + simdgroup_barriers[simdgroup] % 2];
}

inline void release(void* fence) {
#ifdef SIMULATOR_THREAD
  __tsan_release(fence);
#endif
}

inline void acquire(void* fence) {
#ifdef SIMULATOR_THREAD
  __tsan_acquire(fence);
#endif
}

// ---- The order in which lanes and groups run.

inline uint64_t random_state;

inline uint32_t random_below(uint32_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>((random_state >> 11) % n);
}

// The numbers below n, in the launch's order. A std::vector would double the time to compile a kernel.
struct Ordering {
  uint32_t* items = nullptr;
  uint32_t room = 0;

  void arrange(uint32_t n) {
    if (n > room) items = static_cast<uint32_t*>(realloc(items, (room = n) * sizeof *items));
    bool backward = Order(launch.order) == Order::backward;
    for (uint32_t i = 0; i < n; i++) items[i] = backward ? n - 1 - i : i;
    if (Order(launch.order) == Order::shuffled) shuffle(n);
  }

  void shuffle(uint32_t n) {
    for (uint32_t i = n; i > 1; i--) {
      uint32_t other = random_below(i), last = items[i - 1];
      items[i - 1] = items[other];
      items[other] = last;
    }
  }
};

// ---- Waking.

inline bool waits_with(const Lane& a, const Lane& b) {
  return a.wait == b.wait && a.collective == b.collective && a.site.line() == b.site.line() &&
         a.site.column() == b.site.column();
}

inline const char* describe(const Lane& lane, char (&text)[96]) {
  const char* what = lane.wait == Wait::simdgroup ? lane.collective->name : "threadgroup_barrier";
  if (lane.wait == Wait::returned) return "has returned";
  snprintf(text, sizeof text, "waits at %s of line %u, column %u", what, lane.site.line(),
           lane.site.column());
  return text;
}

// Blame the operation at which `waiting` waits, and name a lane that is elsewhere.
inline void fail_divergent(const Lane& waiting, uint32_t first, uint32_t count) {
  uint32_t arrived = 0, elsewhere = 0;
  for (uint32_t i = first; i < first + count; i++) {
    if (waits_with(lanes[i], waiting))
      arrived++;
    else
      elsewhere = i;
  }
  bool simd = waiting.wait == Wait::simdgroup;
  char text[96];
  fail(waiting.site, "%s reached by %u of %u lanes of the %s: thread %u of the group %s",
       simd ? waiting.collective->name : "threadgroup_barrier", arrived, count,
       simd ? "simdgroup" : "threadgroup", elsewhere, describe(lanes[elsewhere], text));
}

inline const Lane* first_waiting(Wait kind, uint32_t first, uint32_t count) {
  for (uint32_t i = first; i < first + count; i++)
    if (lanes[i].wait == kind) return &lanes[i];
  return nullptr;
}

inline bool all_wait_with(const Lane& lane, uint32_t first, uint32_t count) {
  for (uint32_t i = first; i < first + count; i++)
    if (!waits_with(lanes[i], lane)) return false;
  return true;
}

inline void complete(const Lane& lane, uint32_t first, uint32_t count) {
  Simdgroup simdgroup{first, count, {}};
  for (uint32_t i = 0; i < count; i++) simdgroup.operands[i] = lanes[first + i].operand;
  lane.collective->complete(simdgroup, lane.site);
  outcome.simd_ops++;
}

// Returns whether lanes were woken.
inline bool wake_simdgroup(uint32_t first) {
  uint32_t count = least(SIMD_WIDTH, group.threads - first);
  const Lane* lane = first_waiting(Wait::simdgroup, first, count);
  if (!lane) return false;
  if (!all_wait_with(*lane, first, count)) {
    fail_divergent(*lane, first, count);
    return false;
  }
  complete(*lane, first, count);
  for (uint32_t i = first; i < first + count; i++) lanes[i].wait = Wait::none;
  return true;
}

inline bool wake_simdgroups() {
  bool woken = false;
  for (uint32_t first = 0; first < group.threads && !failed(); first += SIMD_WIDTH)
    woken |= wake_simdgroup(first);
  return woken;
}

inline void wake_threadgroup() {
  const Lane* lane = first_waiting(Wait::threadgroup, 0, group.threads);
  if (!lane) return;
  if (!all_wait_with(*lane, 0, group.threads)) return fail_divergent(*lane, 0, group.threads);
  for (uint32_t i = 0; i < group.threads; i++) lanes[i].wait = Wait::none;
  group.barriers++;
  outcome.barriers++;
}

// ---- Groups.

inline void lane_main() {
  arrived();
  kernel_body(kernel_buffers);
  wait(Wait::returned, Site());
}

inline void start_lane(uint32_t i) {
  Lane& lane = lanes[i];
  lane.wait = Wait::none;
  lane.site = Site();
  lane.position[0] = i % group.size[0];
  lane.position[1] = i / group.size[0] % group.size[1];
  lane.position[2] = i / (group.size[0] * group.size[1]);
  prepare(lane.fiber, lane_main);
}

// Run each lane that does not wait until it does; returns whether there was one.
inline bool run_lanes() {
  static Ordering order;
  bool ran = false;
  order.arrange(group.threads);
  for (uint32_t turn = 0; turn < group.threads; turn++) {
    uint32_t i = order.items[turn];
    if (lanes[i].wait != Wait::none) continue;
    current = i;
    ran = true;
    enter(lanes[i].fiber);
    if (failed()) break;
  }
  return ran;
}

inline void run_group() {
  for (uint32_t i = 0; i < group.threads; i++) start_lane(i);
  while (!failed() && run_lanes())
    if (!failed() && !wake_simdgroups() && !failed()) wake_threadgroup();
}

inline void place_group(uint32_t number, const uint32_t (&groups)[3]) {
  group.index[0] = number % groups[0];
  group.index[1] = number / groups[0] % groups[1];
  group.index[2] = number / (groups[0] * groups[1]);
  group.threads = 1;
  for (int axis = 0; axis < 3; axis++) {
    uint32_t rest = launch.grid[axis] - group.index[axis] * launch.threadgroup[axis];
    group.size[axis] = least(rest, launch.threadgroup[axis]);
    group.threads *= group.size[axis];
  }
  group.serial++;
  group.barriers = 0;
  memset(simdgroup_barriers, 0, sizeof simdgroup_barriers);
}

// Clip the threadgroup to the grid, as Metal does, and count the groups along each axis.
inline void divide_grid(uint32_t (&groups)[3]) {
  for (int axis = 0; axis < 3; axis++) {
    launch.threadgroup[axis] = least(launch.threadgroup[axis], launch.grid[axis]);
    groups[axis] = (launch.grid[axis] + launch.threadgroup[axis] - 1) / launch.threadgroup[axis];
  }
}

inline void run_grid() {
  Unseen unseen;
#ifdef SIMULATOR_THREAD
  scheduler_known_as = __tsan_get_current_fiber();
#endif
  static Ordering order;
  uint32_t groups[3];
  divide_grid(groups);
  uint32_t count = groups[0] * groups[1] * groups[2];
  order.arrange(count);
  for (uint32_t turn = 0; turn < count; turn++) {
    place_group(order.items[turn], groups);
    run_group();
    check_margins();
    if (failed()) return;
    outcome.groups++;
  }
}

inline void start(void (*body)(void**), void** buffers, const Launch& requested) {
  kernel_body = body;
  kernel_buffers = buffers;
  launch = requested;
  outcome = Outcome{};
  random_state = 0x9E3779B97F4A7C15u ^ requested.seed;
  for (Shared& variable : shared_variables) variable.bytes = 0;
  run_grid();
}

}  // namespace simulator
