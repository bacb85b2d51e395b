// A rank for tests of launching: joins the control plane as whoever launched it says, then does what its words say.
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <string>

#include "dist/control/client.h"

int main(int argc, char** argv) {
  using namespace weft;
  using namespace weft::dist;
  try {
    const LaunchInfo info = discover(process_environment(""));
    const auto client = ControlClient::connect(info, 30);
    std::printf("%s\n", info.describe().c_str());
    client->set("host " + std::to_string(info.rank), std::to_string(getpid()));
    client->barrier("start", 60);
    std::string pids;
    for (int rank = 0; rank < info.world_size; ++rank) pids += ' ' + client->get("host " + std::to_string(rank), 30);
    std::printf("all are here:%s\n", pids.c_str());
    std::fflush(stdout);
    for (int i = 1; i < argc; ++i) {
      const std::string word = argv[i];
      const size_t equals = word.find('=');
      const std::string what = word.substr(0, equals), value = word.substr(equals + 1);
      if (what == "log") client->log(log::Level::kWarn, value);
      if (what == "metric") client->metric(value);
      if (what == "operation") client->set_operation(value);
      if (what == "sleep") usleep(static_cast<useconds_t>(std::stod(value) * 1e6));
      if (what == "wait") client->get(value, 60);
      if (what == "stop" && info.rank == std::stoi(value)) raise(SIGSTOP);
      if (what == "kill" && info.rank == std::stoi(value)) raise(SIGKILL);
      if (what == "exit" && info.rank == std::stoi(value)) _exit(5);
      if (what == "kill-first" && info.rank == std::stoi(value) && info.restart == 0) raise(SIGKILL);
      if (what == "pid") std::ofstream(value + std::to_string(info.rank)) << getpid();
    }
    client->barrier("end", 60);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
}
