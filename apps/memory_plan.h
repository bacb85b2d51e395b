#pragma once
#include <functional>
#include <string>

#include "apps/train_options.h"
#include "core/memory.h"
#include "models/text/loader.h"

namespace weft::apps {

/// What a training step takes, found by replaying two without memory or arithmetic (core/memory.h, DryRun).
struct MemoryPlan {
  MemoryStatistics device, host;  ///< memory of the device; of the host, page-locked for it
  /// Bytes that the device must have free: what is taken from it, caches included.
  int64_t needs() const { return device.reserved; }
};

/// The data that a step reads, whose contents do not matter, and the vocabulary.
struct PlannedData {
  std::shared_ptr<const text::TokenSource> tokens;
  int64_t vocab = 0;
};

/// @throws Error as the run itself would for options that it refuses.
MemoryPlan plan_memory(const TrainOptions& options, Device device, const PlannedData& data);

/// One line for each way of saving memory that is not in use yet: the peak on the device with it, what that saves in
/// bytes and percent, and what it costs a step in executed FLOPs or copied bytes.
std::string savers_table(const TrainOptions& options, Device device, const PlannedData& data);

/// What would fit into `limit` bytes of the device: the largest micro-batch with the same tokens a step, and what each
/// way of saving memory needs for the micro-batch that was asked for.
std::string what_would_fit(const TrainOptions& options, Device device, const PlannedData& data, int64_t limit);

/// Bytes of weights, gradients and optimizer state that a rank holds between steps, by formula: with P numbers of its
/// part of the model (the largest stage of pp, cut into tp parts), n = dp cp copies (or --zero-ranks) and elements of w
/// bytes
///   weights w P, gradients w P, AdamW and LAMB 8 P (and 4 P of f32 masters for elements of 2 bytes),
/// of which ZeRO keeps 1/n: 1 the last, 2 the last two, 3 all (and while they run, the weights of two units whole).
struct RankBytes {
  int64_t weights = 0, gradients = 0, optimizer = 0;
  int64_t total() const { return weights + gradients + optimizer; }
};
RankBytes rank_bytes(const TrainOptions& options, const dist::Mesh& mesh, int64_t vocab);
/// The same as a table, beside one process that holds all of it.
std::string ranks_table(const TrainOptions& options, const dist::Mesh& mesh, int64_t vocab);

/// @throws Error kMemory with that advice if a step needs more than the device has free (a CPU: than this process may
/// ever have).
void refuse_if_it_cannot_fit(const TrainOptions& options, Device device, const PlannedData& data);

/// Calls run(). @throws what it throws, with that advice behind an Error of kind kMemory; it then counts as free what
/// this process holds of the device too.
void advise_if_memory_ends(const TrainOptions& options, Device device, const PlannedData& data,
                           const std::function<void()>& run);

}  // namespace weft::apps
