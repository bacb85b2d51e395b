#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Pushes what the ABI asks a function to keep, exchanges the stacks and pops. swapcontext would do the same with a
// system call for the signal mask, which costs more than the rest of a kernel's thread.
extern "C" void weft_emulation_switch(void** from, void* to);
__asm__(R"(
.text
.globl weft_emulation_switch
.type weft_emulation_switch, @function
weft_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size weft_emulation_switch, .-weft_emulation_switch
)");
#endif

namespace weft_emulation {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

constinit thread_local Fiber* previous = nullptr;

}  // namespace

Fiber::Fiber(void (*entry)()) : stack_bytes_(kStackBytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  mapping_ =
      mmap(nullptr, page + stack_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  // The lowest page stays out of reach, so that an overflow stops the process.
  if (mapping_ == MAP_FAILED || mprotect(mapping_, page, PROT_NONE) != 0) {
    std::perror("cuda emulation: no memory for the stack of a thread");
    std::abort();
  }
  auto* low = static_cast<unsigned char*>(mapping_) + page;
  stack_ = low;
#if defined(__x86_64__)
  // Six registers, the address to return to, and one word so that the entry finds the stack aligned as after a call.
  auto* top = reinterpret_cast<uintptr_t*>(low + stack_bytes_);
  top[-2] = reinterpret_cast<uintptr_t>(entry);
  stack_pointer_ = top - 8;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = low;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

Fiber::~Fiber() {
  if (mapping_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, stack_bytes_);  // the frames of the parked code end here
#endif
  munmap(mapping_, stack_bytes_ + static_cast<size_t>(sysconf(_SC_PAGESIZE)));
}

void Fiber::switch_to(Fiber& next) {
  previous = this;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, next.stack_, next.stack_bytes_);
#endif
#if defined(__x86_64__)
  weft_emulation_switch(&stack_pointer_, next.stack_pointer_);
#else
  swapcontext(&context_, &next.context_);
#endif
  arrived();
}

void Fiber::arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, &previous->stack_, &previous->stack_bytes_);
#endif
}

}  // namespace weft_emulation
