#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace weft_emulation {

/// A stack and the place where its code goes on. Fibers never move between operating-system threads.
class Fiber {
 public:
  /// The stack that the calling thread already has.
  Fiber() = default;
  /// A stack of its own that starts in `entry` when it is first switched to. `entry` begins with arrived(this fiber)
  /// and never returns.
  explicit Fiber(void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Goes on with `next`; returns when some fiber switches back to this one.
  void switch_to(Fiber& next);
  /// Tells the address sanitizer, if there is one, on which stack we are now.
  void arrived();

 private:
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_ = {};
#endif
  void* mapping_ = nullptr;
  const void* stack_ = nullptr;  // the lowest address
  size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;  // the sanitizer's
};

}  // namespace weft_emulation
