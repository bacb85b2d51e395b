#include "apps/train_resume.h"

#include "core/log.h"
#include "models/gpt_checkpoint.h"

namespace weft::apps {
namespace {

ResumePoint point_at(const std::string& path, bool verified) {
  return {.path = path, .step = read_checkpoint_manifest(path).step, .verified = verified};
}

}  // namespace

std::optional<ResumePoint> find_resume_point(const std::string& resume, const std::filesystem::path& out,
                                             bool started_again, World& world) {
  if (resume.empty() && !started_again) return std::nullopt;
  const CheckingRanks ranks = world.checking_ranks();
  const auto warn = [&](const std::string& line) {
    if (world.speaks()) log::warn(line);
  };
  if (started_again) {
    const LatestCheckpoint latest = find_latest_checkpoint(out.string(), ranks);
    for (const std::string& line : latest.messages()) warn(line);
    if (latest.path) return point_at(*latest.path, true);
  }
  if (resume.empty()) return std::nullopt;
  const std::string path = models::resolve_checkpoint(resume, warn, ranks);
  return point_at(path, path != resume);
}

void refuse_later_checkpoints(const TrainOptions& o, const std::optional<ResumePoint>& from, const Options& options,
                              World& world) {
  const auto refuse = [&](const char* what, const std::string& path) {
    options.reject("out", what, path, ". To go on from the last one: weft train --resume ", o.out.string(),
                   ". Otherwise give another --out");
  };
  std::vector<std::string> later;
  for (const ListedCheckpoint& other : list_checkpoints(o.out.string())) {
    if (!from) refuse("checkpoints of a run are there already, ", other.path);
    if (other.manifest.step > from->step) later.push_back(other.path);
  }
  if (!from) return;
  // Those after the newest intact one of a directory are known to be damaged.
  std::error_code error;
  const auto above = std::filesystem::path(from->path).parent_path();
  if (from->verified && std::filesystem::equivalent(above, o.out, error)) return;
  const CheckingRanks ranks = world.checking_ranks();
  std::string intact;
  for (size_t i = 0; ranks.rank == 0 && i < later.size() && intact.empty(); ++i) {
    if (verify_checkpoint(later[i]).empty()) intact = later[i];
  }
  intact = ranks.gather(intact)[0];
  if (!intact.empty()) refuse("a later checkpoint than the one to go on from is there, ", intact);
}

}  // namespace weft::apps
