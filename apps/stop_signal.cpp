#include "apps/stop_signal.h"

#include <unistd.h>

#include <atomic>
#include <csignal>

namespace weft::apps {
namespace {

// What a signal handler may touch: lock-free atomics only.
std::atomic<int> received = 0;
static_assert(std::atomic<int>::is_always_lock_free);

void on_signal(int signal) {
  if (received.exchange(signal) != 0) _exit(128 + signal);
}

}  // namespace

StopSignal::StopSignal() {
  received = 0;
  struct sigaction action = {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

StopSignal::~StopSignal() {
  signal(SIGINT, SIG_DFL);
  signal(SIGTERM, SIG_DFL);
}

bool StopSignal::requested() const { return received != 0; }

const char* StopSignal::name() const { return received == SIGINT ? "SIGINT" : received == SIGTERM ? "SIGTERM" : ""; }

}  // namespace weft::apps
