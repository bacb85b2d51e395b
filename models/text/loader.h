#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "models/text/shard.h"

namespace weft::text {

/// Rows of tokens for one step.
struct Batch {
  int64_t rows = 0;              ///< B
  int64_t context = 0;           ///< T
  std::vector<int32_t> inputs;   ///< [B, T]
  std::vector<int32_t> targets;  ///< [B, T]: the token after each input; kIgnore where there is none
  int64_t valid = 0;             ///< targets that are not kIgnore

  static constexpr int32_t kIgnore = -1;
};

/// Where the samples of a training run lie in n tokens: a pure function of (seed, epoch, index), with no state.
///
/// Each epoch cuts the tokens into windows of `context` inputs that do not overlap, from an offset that the epoch
/// draws, and visits each window once in an order that the epoch draws. A window reads one token more, its last target.
/// So that there is room for the offset, the last whole window is given up (if there are two or more): an epoch leaves
/// out less than 2 * context tokens, at other places each time. The order is a Feistel permutation keyed by (seed,
/// epoch) and restricted to the windows by walking its cycles: any place of any epoch is found at once.
class SampleOrder {
 public:
  /// @throws Error  kValue if context < 1 or tokens < context + 1.
  SampleOrder(int64_t tokens, int64_t context, uint64_t seed);
  /// Samples (windows) an epoch.
  int64_t per_epoch() const { return windows_; }
  int64_t epoch_of(int64_t sample) const { return sample / windows_; }
  /// First input of a sample, counted from 0 over all epochs. Inputs are the `context` tokens from there.
  int64_t begin(int64_t sample) const;

 private:
  int64_t tokens_, context_, windows_;
  uint64_t seed_;
};

struct LoaderOptions {
  int64_t batch = 1;       ///< B, rows of every batch of this rank
  int64_t context = 0;     ///< T; must be given
  uint64_t seed = 0;       ///< of the order
  int64_t rank = 0;        ///< which of them this process is
  int64_t world_size = 1;  ///< processes that share the data
  int64_t prefetch = 2;    ///< batches prepared ahead on a thread; 0: none and no thread
  /// Batches of each rank in a round; empty: one each. Rank 0 takes the first shares[0] batches of a round, rank 1 the
  /// next shares[1], and so on. With the ranks' micro-batches of a step, a round is a step.
  std::vector<int64_t> shares = {};
};

/// Endless batches for training in the order of SampleOrder.
///
/// The only state is position(), the number of samples that all ranks together have consumed. A checkpoint keeps it, at
/// the end of a round; after seek(position) a round begins there and the same samples follow, whatever the batch size,
/// the number of ranks and the prefetch depth. One thread at a time may use a Loader.
class Loader {
 public:
  /// @throws Error  kValue for an option outside its range or too few tokens.
  Loader(std::shared_ptr<const TokenSource> source, const LoaderOptions& options);
  Loader(Shard shard, const LoaderOptions& options);
  /// Opens the shard. @throws Error  also as Shard::open.
  Loader(const std::string& path, const LoaderOptions& options);
  Loader(Loader&&) noexcept;
  Loader& operator=(Loader&&) noexcept;
  ~Loader();  ///< waits for the batch that is being prepared, no longer

  /// The next batch. An Error of the source, wherever it arose, is thrown here and leaves position() as it was: the
  /// next call tries the same batch again.
  Batch next();

  /// Within a round it grows by as much with each batch of this rank, rounded down.
  int64_t position() const;
  /// @throws Error  kValue if position is not in [0, 2^62).
  void seek(int64_t position);

  /// Epoch, from 0, of the sample at position().
  int64_t epoch() const;
  int64_t samples_per_epoch() const;
  const TokenSource& source() const;
  const LoaderOptions& options() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Held-out tokens in order: every token but the first is a target exactly once. The last window is filled up with
/// input 0 and target Batch::kIgnore, the last batch has as many rows as windows are left. Batches can be asked for in
/// any order and from several threads.
class Evaluation {
 public:
  /// @throws Error  kValue if batch < 1, context < 1 or the source has fewer than 2 tokens.
  Evaluation(std::shared_ptr<const TokenSource> source, int64_t batch, int64_t context);
  Evaluation(Shard shard, int64_t batch, int64_t context);

  int64_t batches() const;
  /// Targets over all batches: tokens - 1.
  int64_t targets() const;
  /// @throws Error  kIndex if index is not in [0, batches()).
  Batch batch(int64_t index) const;

 private:
  std::shared_ptr<const TokenSource> source_;
  int64_t batch_, context_;
};

}  // namespace weft::text
