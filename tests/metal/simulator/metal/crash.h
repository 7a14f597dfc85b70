// A kernel that crashes, in a library, ends the launch and not the Python that made it.
#pragma once
#include <csetjmp>
#include <csignal>

#include "scheduler.h"

namespace simulator {

inline sigjmp_buf before_launch;

inline void crash(int signal) { siglongjmp(before_launch, signal); }

// Signals of a crash go to `crash` for as long as one of these lives. The handler has a stack of its own,
// because a lane that overflows its own has none left.
class CrashGuard {
  static constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  static constexpr int COUNT = 4;
  struct sigaction former[COUNT];
  stack_t former_stack;
  inline static char handler_stack[64 << 10];

 public:
  CrashGuard() {
    stack_t stack{};
    stack.ss_sp = handler_stack;
    stack.ss_size = sizeof handler_stack;
    sigaltstack(&stack, &former_stack);
    struct sigaction action{};
    action.sa_handler = crash;
    action.sa_flags = SA_ONSTACK;
    for (int i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &action, &former[i]);
  }

  ~CrashGuard() {
    for (int i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &former[i], nullptr);
    sigaltstack(&former_stack, nullptr);
  }
};

inline void fail_crash(int signal) {
  const char* what = "reads or writes where there is no memory, or has too many local variables";
  if (signal == SIGFPE) what = "divides an integer by zero";
  if (signal == SIGILL) what = "executes what is no instruction";
  const Lane& lane = lanes[current];
  fail(lane.site, "thread %u of group (%u, %u, %u) %s%s", current, group.index[0], group.index[1],
       group.index[2], what,
       lane.site.line() ? ", after waiting here" : ", before it waits for the first time");
}

// Each kernel is a library with lanes of its own, and Linux allows a process 65,530 maps: stacks, which take
// two each, do not outlive a launch.
inline void drop_stacks() {
  for (Lane& lane : lanes) {
    drop_stack(lane.fiber.stack);
    lane.fiber.stack = nullptr;
  }
}

inline void start_guarded(void (*body)(void**), void** buffers, const Launch& requested) {
  CrashGuard guard;
  if (int signal = sigsetjmp(before_launch, 1))
    fail_crash(signal);
  else
    start(body, buffers, requested);
  drop_stacks();
}

}  // namespace simulator
