#pragma once
#include <optional>
#include <string>

#include "apps/options.h"
#include "apps/train_options.h"
#include "apps/world.h"

namespace weft::apps {

/// The checkpoint that a run goes on from.
struct ResumePoint {
  std::string path;
  int64_t step = 0;
  /// Whether all of its files have just been read and are intact; if not, they are to be checked when it is opened.
  bool verified = false;
};

/// Which checkpoint a call of weft train goes on from: in a directory of a run the newest intact one, otherwise the one
/// that is given. Where a launcher has started the ranks again with the same command, what the run has saved in `out`
/// in the meantime comes first. All ranks find it together, each reads its share of the files (CheckingRanks), and
/// rank 0 warns of those that are damaged. Nothing if the call begins a new run.
/// @param resume  a directory, or ""
/// @throws Error kIo, kData if there is none.
std::optional<ResumePoint> find_resume_point(const std::string& resume, const std::filesystem::path& out,
                                             bool started_again, World& world);

/// A new run among the checkpoints of another, or one that goes on before the last, would mix the two: the next
/// --resume would find the one with more steps. @throws Error kUsage for `out`.
void refuse_later_checkpoints(const TrainOptions& o, const std::optional<ResumePoint>& from, const Options& options,
                              World& world);

}  // namespace weft::apps
