// Processes that cannot meet: a port that is taken, another run, wrong keys, an address where nobody or somebody else
// is. Each is an error that names what is wrong, within the time that was given, and leaves nothing behind.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <thread>
#include <utility>

#include "core/error.h"
#include "dist/control/client.h"
#include "dist/control/server.h"
#include "dist/processes.h"

namespace weft::dist {
namespace {

constexpr double kTimeout = 0.5;

/// A socket of somebody else on a port of this machine.
class Stranger {
 public:
  enum Kind {
    silent,  ///< takes connections, and says nothing
    talker,  ///< greets in another language
    deaf,    ///< answers no connection, as a firewall that drops them
    none,    ///< nobody: the port was free a moment ago
  };
  explicit Stranger(Kind kind) {
    fd_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in here{};
    here.sin_family = AF_INET;
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof here;
    auto* const address = reinterpret_cast<sockaddr*>(&here);
    const bool good = bind(fd_, address, length) == 0 && getsockname(fd_, address, &length) == 0 &&
                      (kind == none || listen(fd_, kind == deaf ? 0 : 16) == 0);
    EXPECT_TRUE(good);
    port_ = ntohs(here.sin_port);
    if (kind == none) close(std::exchange(fd_, -1));
    if (kind == deaf) {  // the one place in its queue is taken
      for (int i = 0; i < 2; ++i) {
        waiting_.push_back(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
        (void)!connect(waiting_.back(), address, length);
      }
    }
    if (kind == talker) {
      thread_ = std::thread([this] {
        for (int peer; (peer = accept(fd_, nullptr, nullptr)) >= 0; close(peer)) {
          const std::string text = "220 mail.example ESMTP\r\n";
          (void)!send(peer, text.data(), text.size(), MSG_NOSIGNAL);
        }
      });
    }
  }
  Stranger(const Stranger&) = delete;
  Stranger& operator=(const Stranger&) = delete;
  ~Stranger() {
    if (fd_ >= 0) shutdown(fd_, SHUT_RDWR);
    if (thread_.joinable()) thread_.join();
    if (fd_ >= 0) close(fd_);
    for (const int fd : waiting_) close(fd);
  }
  int port() const { return port_; }
  std::string address() const { return concat("127.0.0.1:", port_); }

 private:
  int fd_ = -1, port_ = 0;
  std::vector<int> waiting_;
  std::thread thread_;
};

size_t open_descriptors() {
  const std::filesystem::directory_iterator all("/proc/self/fd");
  return static_cast<size_t>(std::distance(begin(all), end(all)));
}

size_t threads() {
  const std::filesystem::directory_iterator all("/proc/self/task");
  return static_cast<size_t>(std::distance(begin(all), end(all)));
}

class Rendezvous : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "weft-rendezvous-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
    keys_.write((directory_ / "keys").string());
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  /// `call` throws an Error that holds every part, in `seconds`, and leaves no descriptor and no thread.
  void expect_named(const std::string& title, const std::vector<std::string>& parts, const std::function<void()>& call,
                    double seconds = kTimeout + 1.5) {
    const ::testing::ScopedTrace trace(__FILE__, __LINE__, title);
    const size_t descriptors = open_descriptors(), running = threads();
    const auto begin = std::chrono::steady_clock::now();
    std::string text;
    try {
      call();
    } catch (const Error& error) {
      text = error.what();
    }
    EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(), seconds);
    EXPECT_NE(text, "") << "no error";
    for (const std::string& part : parts) EXPECT_NE(text.find(part), std::string::npos) << text << "\nlacks " << part;
    EXPECT_EQ(open_descriptors(), descriptors);
    EXPECT_EQ(threads(), running);
  }

  /// Rank `rank` of two of a Slurm job, whose rank 0 serves the control plane.
  LaunchInfo info(int rank, const std::string& rendezvous) const {
    LaunchInfo info;
    info.launcher = Launcher::slurm;
    info.rank = rank;
    info.world_size = 2;
    info.rendezvous = rendezvous;
    info.job = "Slurm 7.0";
    info.keys_file = (directory_ / "keys").string();
    return info;
  }
  void join(const LaunchInfo& info) const { ControlClient::connect(info, kTimeout); }

  const ControlKeys keys_ = ControlKeys::make();
  std::filesystem::path directory_;
};

TEST_F(Rendezvous, OfTheControlPlane) {
  using Kind = Stranger::Kind;
  for (const Kind kind : {Kind::silent, Kind::talker}) {
    const Stranger stranger(kind);
    expect_named(concat("a port that is taken, ", kind),
                 {concat("cannot listen at 127.0.0.1:", stranger.port()), "in use"},
                 [&] { join(info(0, stranger.address())); });
  }
  for (const Kind kind : {Kind::none, Kind::silent, Kind::talker, Kind::deaf}) {
    const Stranger stranger(kind);
    expect_named(concat("an address of nobody or somebody else, ", kind),
                 {"rank 1 of 2 joins", stranger.address(),
                  kind == Kind::none ? "nobody listens there" : "is it this run's server that listens there"},
                 [&] { join(info(1, stranger.address())); });
  }
  expect_named("no address", {"an address is HOST:PORT"}, [&] { join(info(1, "somewhere")); });
  expect_named("a host that does not exist", {"no.such.host.invalid:29400"},
               [&] { join(info(1, "no.such.host.invalid:29400")); });

  ControlServerOptions options;
  options.world_size = 2;
  options.keys = keys_;
  options.run_id = derived_run_id(keys_.run_id, "Slurm 7.0");
  const ControlServer server(options);
  const std::string here = concat("127.0.0.1:", server.port());
  const auto with = [&](auto change) {
    LaunchInfo changed = info(1, here);
    change(changed);
    return changed;
  };
  expect_named("rank 0 where another run's server is", {concat("cannot listen at 127.0.0.1:", server.port()), "in use"},
               [&] { join(info(0, here)); });
  expect_named("another job", {"this server serves run " + options.run_id + ", not "},
               [&] { join(with([](LaunchInfo& changed) { changed.job = "Slurm 8.0"; })); });
  expect_named("another run id", {"this server serves run ", ", not " + std::string(32, 'a')},
               [&] { join(with([](LaunchInfo& changed) { changed.run_id = std::string(32, 'a'); })); });
  expect_named("no run id", {"no run id: \"7\""},
               [&] { join(with([](LaunchInfo& changed) { changed.run_id = "7"; })); });
  expect_named("another number of ranks", {"the run has 2 ranks; this one expects 3"},
               [&] { join(with([](LaunchInfo& changed) { changed.world_size = 3; })); });
  expect_named("a rank beyond the last", {"rank 5 is outside [0, 2)"},
               [&] { join(with([](LaunchInfo& changed) { changed.rank = 5; })); });
  const std::string other = (directory_ / "other").string();
  ControlKeys::make().write(other);
  expect_named("keys of another run", {"do both sides have the same keys"},
               [&] { join(with([&](LaunchInfo& changed) { changed.keys_file = other; })); });
  expect_named("no keys", {"cannot be opened"},
               [&] { join(with([&](LaunchInfo& changed) { changed.keys_file = other + ".none"; })); });
  EXPECT_TRUE(server.members().empty());
}

TEST_F(Rendezvous, OfAGroup) {
  if (*why_no_gloo() != '\0') GTEST_SKIP() << why_no_gloo();
  ProcessOptions options;
  options.size = 2;
  options.connect_timeout = kTimeout;
  options.heartbeat = 0.1, options.silence = 0.5;
  int stores = 0;
  const auto meet = [&](int rank, const std::string& key, const std::string& address) {
    FileStore store(directory_ / concat("store", stores++));
    if (!key.empty()) store.set("key", key);
    if (!address.empty()) store.set("address/0", address);
    options.rank = rank;
    Group world = gloo_group(options, store);
    world.barrier();
  };
  const std::string key(32, '7');
  gloo_group({.rank = 0, .size = 1}, *std::make_unique<FileStore>(directory_ / "first"));  // what Gloo makes once
  expect_named("nobody comes", {"rank 0 of 2 has waited 0.5 s for ranks 1"}, [&] { meet(0, "", ""); });
  expect_named("an empty store", {"nobody has set \"key\""}, [&] { meet(1, "", ""); });
  expect_named("a key of another length", {"the key in the store has 3 bytes"}, [&] { meet(1, "777", "127.0.0.1 1"); });
  expect_named("no address", {"not an address in the store: \"somewhere\""}, [&] { meet(1, key, "somewhere"); });
  expect_named("a name", {"\"a.host\" cannot be used"}, [&] { meet(1, key, "a.host 29400"); });
  const Stranger none(Stranger::none), deaf(Stranger::deaf), talker(Stranger::talker), silent(Stranger::silent);
  expect_named("nobody at rank 0's address, as in the store of an earlier run",
               {"rank 0 cannot be reached at 127.0.0.1", "refused"},
               [&] { meet(1, key, concat("127.0.0.1 ", none.port())); });
  expect_named("connections that nothing answers", {"rank 0 cannot be reached at 127.0.0.1", "timed out"},
               [&] { meet(1, key, concat("127.0.0.1 ", deaf.port())); });
  for (const int port : {talker.port(), silent.port()}) {
    expect_named("somebody else",
                 {concat("rank 0 cannot be reached at 127.0.0.1 ", port), "is the store that of an earlier"},
                 [&] { meet(1, key, concat("127.0.0.1 ", port)); });
  }
  options.address = "192.0.2.1";
  expect_named("an address of another machine", {"address \"192.0.2.1\" cannot be bound"}, [&] { meet(0, "", ""); });
}

}  // namespace
}  // namespace weft::dist
