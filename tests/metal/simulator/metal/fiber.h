// A fiber: a stack of its own on which a lane runs until it hands control back.
//
// Switching saves what the ABI lets a callee keep, in a dozen instructions on x86-64; elsewhere it is
// ucontext's, which makes a system call each time. The sanitizers follow stacks by themselves only for real
// threads, so they are told of every switch.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#if !defined(__x86_64__) || !defined(__ELF__)
#include <ucontext.h>
#endif
#ifdef SIMULATOR_ADDRESS
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMULATOR_THREAD
#include <sanitizer/tsan_interface.h>
#endif

namespace simulator {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t GUARD_BYTES = 4096;

#if defined(__x86_64__) && defined(__ELF__)
asm(R"(
    .text
    .local simulator_switch
    .type simulator_switch, @function
simulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
    .size simulator_switch, .-simulator_switch
)");
extern "C" void simulator_switch(void** saved, void* next) __attribute__((visibility("hidden")));

struct Context {
  void* stack_pointer = nullptr;
};

inline void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + STACK_BYTES);
  *--top = nullptr;  // where entry would return to; it also aligns the stack as a call does
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  context.stack_pointer = top;
}

inline void swap(Context& from, Context& to) { simulator_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Context {
  ucontext_t state;
};

inline void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = STACK_BYTES;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

inline void swap(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#endif

// Above a page that nothing may touch: a kernel with too many local variables stops at it.
inline char* new_stack() {
  void* pages =
      mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) abort();
  mprotect(pages, GUARD_BYTES, PROT_NONE);
  return static_cast<char*>(pages) + GUARD_BYTES;
}

inline void drop_stack(char* stack) {
  if (stack) munmap(stack - GUARD_BYTES, GUARD_BYTES + STACK_BYTES);
}

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* known_as = nullptr;  // ThreadSanitizer's name for it
};

inline Context scheduler_context;
#ifdef SIMULATOR_ADDRESS
inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;
#endif
#ifdef SIMULATOR_THREAD
inline void* scheduler_known_as;
constexpr unsigned WITHOUT_ORDERING = __tsan_switch_to_fiber_no_sync;
constexpr int FIBERS_KEPT = 2000;  // each takes almost a megabyte

// Lanes of two groups are different threads, so a lane gets a new name, and a stack that was nobody's.
inline void rename(Fiber& fiber) {
  static int made = 0;
  if (++made > FIBERS_KEPT && fiber.known_as) __tsan_destroy_fiber(fiber.known_as);
  fiber.known_as = __tsan_create_fiber(0);
  drop_stack(fiber.stack);
  fiber.stack = nullptr;
}
#else
inline void rename(Fiber&) {}
#endif

inline void prepare(Fiber& fiber, void (*entry)()) {
  rename(fiber);
  if (!fiber.stack) fiber.stack = new_stack();
  prepare(fiber.context, fiber.stack, entry);
}

// From the scheduler to a lane; returns when the lane leaves.
inline void enter(Fiber& fiber) {
#ifdef SIMULATOR_THREAD
  __tsan_switch_to_fiber(fiber.known_as, WITHOUT_ORDERING);
#endif
#ifdef SIMULATOR_ADDRESS
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, STACK_BYTES);
#endif
  swap(scheduler_context, fiber.context);
#ifdef SIMULATOR_ADDRESS
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// From a lane to the scheduler; returns when the scheduler enters the lane again.
inline void leave(Fiber& fiber) {
#ifdef SIMULATOR_THREAD
  __tsan_switch_to_fiber(scheduler_known_as, WITHOUT_ORDERING);
#endif
#ifdef SIMULATOR_ADDRESS
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
  swap(fiber.context, scheduler_context);
#ifdef SIMULATOR_ADDRESS
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

// The first thing a lane does.
inline void arrived() {
#ifdef SIMULATOR_ADDRESS
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

// While one of these lives, ThreadSanitizer does not see what the simulator itself reads and writes.
struct Unseen {
#ifdef SIMULATOR_THREAD
  Unseen();
  ~Unseen();
#else
  Unseen() {}
#endif
};

}  // namespace simulator

#ifdef SIMULATOR_THREAD
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

inline simulator::Unseen::Unseen() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}

inline simulator::Unseen::~Unseen() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
#endif
