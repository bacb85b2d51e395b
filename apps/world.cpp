#include "apps/world.h"

#include "apps/environment.h"
#include "dist/processes.h"
#include "dist/threads.h"

namespace weft::apps {

World::World() : launched_(dist::discover(weft::process_environment(""))) {}

Device World::device(Device planned) const {
  return size() == 1 || planned.kind == DeviceKind::cpu ? planned : Device::cuda(launched_.local_rank);
}

void World::connect(Device device) {
  if (size() == 1) {
    group_.emplace(dist::self_group(device));
    return;
  }
  control_ = dist::ControlClient::connect(launched_);
  const dist::ProcessOptions options{.rank = rank(), .size = size()};
  group_.emplace(device.kind == DeviceKind::cpu ? dist::gloo_group(options, *control_)
                                                : dist::nccl_group(options, *control_, device.index));
}

}  // namespace weft::apps
