#include "apps/world.h"

#include "apps/environment.h"
#include "dist/processes.h"
#include "dist/threads.h"

namespace weft::apps {

World::World() : launched_(dist::discover(weft::process_environment(""))) {}

void World::connect() {
  if (size() == 1) {
    group_.emplace(dist::self_group());
    return;
  }
  control_ = dist::ControlClient::connect(launched_);
  group_.emplace(dist::gloo_group({.rank = rank(), .size = size()}, *control_));
}

}  // namespace weft::apps
