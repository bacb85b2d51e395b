#include "apps/world.h"

#include "apps/environment.h"
#include "dist/processes.h"
#include "dist/texts.h"
#include "dist/threads.h"

namespace weft::apps {

World::World() : launched_(dist::discover(weft::process_environment(""))) {}

Device World::device(Device planned) const {
  return size() == 1 || planned.kind == DeviceKind::cpu ? planned : Device::cuda(launched_.local_rank);
}

dist::ControlClient& World::control() {
  if (!control_) control_ = dist::ControlClient::connect(launched_);
  return *control_;
}

CheckingRanks World::checking_ranks() {
  if (size() == 1) return {};
  control();
  CheckingRanks ranks;
  ranks.rank = rank(), ranks.size = size();
  ranks.gather = [this](const std::string& own) {
    // As long as a rank may read its share of a large checkpoint; one that is lost ends the wait at once.
    constexpr double kSeconds = 24 * 3600;
    const std::string name = concat("checked checkpoints ", gathered_++);
    return dist::gather_texts(control(), name, rank(), size(), own, kSeconds);
  };
  return ranks;
}

void World::connect(Device device) {
  if (size() == 1) {
    group_.emplace(dist::self_group(device));
    return;
  }
  const dist::ProcessOptions options{.rank = rank(), .size = size()};
  group_.emplace(device.kind == DeviceKind::cpu ? dist::gloo_group(options, control())
                                                : dist::nccl_group(options, control(), device.index));
}

}  // namespace weft::apps
