#pragma once
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "dist/group.h"
#include "dist/store.h"

namespace weft::dist {

struct ProcessOptions {
  int rank = 0, size = 1;
  /// Numeric address of the network interface of this process that the others reach.
  std::string address = "127.0.0.1";
  /// Seconds after which an operation that not all ranks have come to is an error: longer than any rank computes
  /// between two operations. A rank that dies or stops is found without it.
  double timeout = 1800;
  double connect_timeout = 60;  ///< seconds in which all processes must have come
  double heartbeat = 0.25;      ///< seconds between two signs of life of a process
  double silence = 3;           ///< seconds without one after which it counts as stopped
  /// File for the last 1,000 operations of this process when something fails, ".rankR" is appended; "": the newest go
  /// to the log.
  std::string flight_record = {};
  /// Told what this process has done while it connects: "linked" (messages and heartbeats to all others), "addressed"
  /// (knows where their data arrive), "paired" with each of them. For tests, which end it there.
  std::function<void(std::string_view point)> connecting = {};
};

/// The world of a process, whose data travel with Gloo over TCP: on the CPU, on one machine or on several. All
/// processes call it with one store. SIGPIPE is ignored from then on, if nothing else handles it.
/// @throws Error  kIo if processes do not come in time; kUsage if this build has no Gloo or the options make no sense.
Group gloo_group(const ProcessOptions& options, Store& store);

/// The same on GPUs: this process's tensors are on cuda:`device`, data travel with NCCL, whose order of summation is
/// its own. The store must outlive the group, whose subgroups use it. @throws Error  kUsage if this build has no NCCL.
Group nccl_group(const ProcessOptions& options, Store& store, int device);

/// "" or why there is no such group in this build.
const char* why_no_gloo();
const char* why_no_nccl();

/// Which NCCL a group of GPUs would have here, and which the build had, for people to read: "2.28.9, built
/// with 2.28.9".
std::string describe_nccl();

}  // namespace weft::dist
