#pragma once
#include <filesystem>
#include <functional>

#include "dist/group.h"

namespace weft::apps {

/// Runs program(world, directory) on `ranks` processes of this machine that exchange tensors through Gloo: rank 0 is
/// this process, the others are forked from it and end with it. Each has its share of the threads that this one had.
/// `directory` is theirs alone and empty but for the group's own; it is removed at the end.
///
/// A rank that throws ends the others; what rank 0 throws is thrown, after all have ended.
/// @throws Error kState if this process has other threads already, which a forked one would lack; kIo if a rank cannot
///         be started or fails.
void run_processes(int ranks,
                   const std::function<void(dist::Group& world, const std::filesystem::path& directory)>& program);

}  // namespace weft::apps
