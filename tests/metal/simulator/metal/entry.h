// How the translated kernel, `run_kernel`, is reached: from Python as a library, or as a program of its own
// for the sanitizers, which do not work inside a Python that was built without them.
#pragma once
#undef kernel
#undef device
#undef constant
#undef thread
#undef threadgroup
#include "crash.h"

extern "C" __attribute__((visibility("default"))) int simulate(void** buffers,
                                                               const simulator::Launch* launch,
                                                               simulator::Outcome* outcome) {
#ifdef SIMULATOR_PROGRAM
  simulator::start(run_kernel, buffers, *launch);
#else
  simulator::start_guarded(run_kernel, buffers, *launch);
#endif
  *outcome = simulator::outcome;
  return simulator::failed();
}

#ifdef SIMULATOR_PROGRAM
// The file holds a Launch, the number of buffers, and for each its bytes and where in them its pointer
// points.
static void* read_buffer(FILE* file) {
  uint64_t header[2];
  if (fread(header, sizeof header, 1, file) != 1) exit(3);
  char* memory = static_cast<char*>(malloc(header[0]));
  if (header[0] && fread(memory, header[0], 1, file) != 1) exit(3);
  return memory + header[1];
}

int main(int, char** arguments) {
  FILE* file = fopen(arguments[1], "rb");
  simulator::Launch requested;
  uint64_t count;
  if (!file || fread(&requested, sizeof requested, 1, file) != 1 || fread(&count, sizeof count, 1, file) != 1)
    return 3;
  void** buffers = static_cast<void**>(malloc(count * sizeof(void*)));
  for (uint64_t i = 0; i < count; i++) buffers[i] = read_buffer(file);
  fclose(file);
  simulator::Outcome result;
  simulate(buffers, &requested, &result);
  // Proof for the reader that the kernel ran to its end. No destructors: fibers may be in the middle of it.
  printf("simulated %d %s\n", result.line, result.text);
  fflush(stdout);
  _Exit(0);
}
#endif
