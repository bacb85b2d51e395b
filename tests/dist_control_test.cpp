// The control plane: ranks as threads of one process, hostile peers as sockets of another.
#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <zmq.hpp>

#include "core/file.h"
#include "dist/control/client.h"
#include "dist/control/message.h"
#include "dist/control/server.h"
#include "tests/hostile_peers.h"

namespace {

using namespace weft;
using namespace weft::dist;
using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

void expect_has(const std::string& text, const std::string& part, int line) {
  EXPECT_NE(text.find(part), std::string::npos) << "line " << line << ": " << text << "\nwanted: " << part;
}
#define EXPECT_HAS(text, part) expect_has(text, part, __LINE__)

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

/// The message of the Error that `call` throws; "" if it throws none.
std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

/// Waits for something that happens on another thread.
bool eventually(const std::function<bool()>& condition, std::chrono::milliseconds limit = 10s) {
  for (const auto deadline = Clock::now() + limit; Clock::now() < deadline; std::this_thread::sleep_for(2ms)) {
    if (condition()) return true;
  }
  return condition();
}

std::string address_of(const ControlServer& server) { return "127.0.0.1:" + std::to_string(server.port()); }

class Control : public ::testing::Test {
 protected:
  ControlServer& serve(int world_size, double silence = 5) {
    ControlServerOptions options;
    options.world_size = world_size;
    options.keys = keys_;
    options.silence = silence;
    options.on_log = [this](const LogRecord& record) {
      const std::lock_guard lock(mutex_);
      logs_.push_back(record);
    };
    options.on_metric = [this](const MetricRecord& record) {
      const std::lock_guard lock(mutex_);
      metrics_.push_back(record);
    };
    options.on_member = [this](const Member& member) {
      const std::lock_guard lock(mutex_);
      members_.push_back(member);
    };
    server_ = std::make_unique<ControlServer>(options);
    return *server_;
  }

  ControlClientOptions client_options(int rank, int world_size) const {
    ControlClientOptions options;
    options.address = address_of(*server_);
    options.rank = rank;
    options.world_size = world_size;
    options.keys = keys_.for_client();
    options.connect_timeout = 10;
    return options;
  }
  std::unique_ptr<ControlClient> join(int rank, int world_size) const {
    return std::make_unique<ControlClient>(client_options(rank, world_size));
  }

  /// A socket with the run's keys that sends whatever it is told.
  zmq::socket_t raw_socket(zmq::context_t& context) const {
    zmq::socket_t socket(context, zmq::socket_type::dealer);
    socket.set(zmq::sockopt::linger, 1000);
    socket.set(zmq::sockopt::curve_serverkey, keys_.server_public);
    socket.set(zmq::sockopt::curve_publickey, keys_.client_public);
    socket.set(zmq::sockopt::curve_secretkey, keys_.client_secret);
    socket.connect("tcp://" + address_of(*server_));
    return socket;
  }

  template <class T>
  std::vector<T> copy_of(const std::vector<T>& list) {
    const std::lock_guard lock(mutex_);
    return list;
  }

  const ControlKeys keys_ = ControlKeys::make();
  std::mutex mutex_;
  std::vector<LogRecord> logs_;
  std::vector<MetricRecord> metrics_;
  std::vector<Member> members_;
  std::unique_ptr<ControlServer> server_;
};

TEST_F(Control, AGetWaitsUntilAnotherRankHasSetTheKey) {
  serve(2);
  const auto a = join(0, 2), b = join(1, 2);
  EXPECT_EQ(a->find("id"), std::nullopt);
  std::string got;
  std::thread waiting([&] { got = a->get("id", 10); });
  std::this_thread::sleep_for(50ms);
  const std::string value("\0binary\xff", 8);
  b->set("id", value);
  waiting.join();
  EXPECT_EQ(got, value);
  EXPECT_EQ(b->find("id"), value);
  EXPECT_EQ(server_->find("id"), value);
  a->set("id", "new");
  EXPECT_EQ(b->get("id", 1), "new");
  server_->set("from the launcher", "1");
  EXPECT_EQ(b->get("from the launcher", 1), "1");
}

TEST_F(Control, AGetEndsAtItsTimeoutAndSaysWhatItWaitedFor) {
  serve(1);
  const auto a = join(0, 1);
  const auto begin = Clock::now();
  const std::string error = message_of([&] { a->get("never", 0.2); });
  EXPECT_HAS(error, "rank 0 waits for key \"never\": nobody set it in 0.2 s");
  EXPECT_GE(seconds_since(begin), 0.2);
  EXPECT_LT(seconds_since(begin), 3);
}

TEST_F(Control, AValueOfTheLargestSizeArrivesAndALargerOneIsRefused) {
  serve(1);
  const auto a = join(0, 1);
  const std::string large(kMaxValue, 'x');
  a->set("large", large);
  EXPECT_EQ(a->get("large", 5), large);
  EXPECT_HAS(message_of([&] { a->set("larger", large + "x"); }), "at most 512 and 1044480");
  EXPECT_HAS(message_of([&] { a->set(std::string(513, 'k'), ""); }), "of 513");
}

TEST_F(Control, TheStoreHasALimitThatIsToldToWhoeverReachesIt) {
  serve(1);
  const auto a = join(0, 1);
  const std::string large(kMaxValue, 'x');
  int stored = 0;
  const std::string error = message_of([&] {
    for (; stored < 100; ++stored) a->set("key " + std::to_string(stored), large);
  });
  EXPECT_HAS(error, "the store is full");
  EXPECT_EQ(stored, 64);
  a->set("key 0", "");  // replacing gives the bytes back
  a->set("key 64", large);
  EXPECT_LE(server_->statistics().stored_bytes, 64u << 20);
}

TEST_F(Control, ABarrierReleasesNobodyBeforeTheLastRankAndMayBeUsedAgain) {
  constexpr int kRanks = 4, kRounds = 20;
  serve(kRanks);
  std::atomic<int> entered = 0;
  std::atomic<bool> early = false;
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < kRanks; ++rank) {
    ranks.emplace_back([&, rank] {
      const auto client = join(rank, kRanks);
      for (int round = 1; round <= kRounds; ++round) {
        ++entered;
        client->barrier("start", 20);
        if (entered < round * kRanks) early = true;
        client->barrier("end", 20);
      }
    });
  }
  for (std::thread& rank : ranks) rank.join();
  EXPECT_FALSE(early);
  EXPECT_EQ(entered, kRanks * kRounds);
}

TEST_F(Control, ABarrierThatTimesOutNamesTheRanksThatDidNotCome) {
  serve(3);
  const auto a = join(0, 3), b = join(1, 3);
  EXPECT_HAS(message_of([&] { a->barrier("start", 0.2); }), "2 of 3 ranks did not come in time: 1, 2");
}

TEST_F(Control, ASilentRankIsDeclaredLostAndTheOthersAreToldItsHostPidAndOperation) {
  serve(2, 0.4);
  std::mutex mutex;
  std::vector<Member> told;
  ControlClientOptions options = client_options(0, 2);
  options.on_member = [&](const Member& member) {
    const std::lock_guard lock(mutex);
    told.push_back(member);
  };
  const ControlClient survivor(options);
  // A process that hangs as a whole: stopped by a signal, it sends no heartbeat.
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  // After a fork only the forking thread lives: the child execs nothing, but builds everything of its own.
  const pid_t child = fork();
  if (child == 0) {
    const auto client = join(1, 2);
    client->set_operation("all_reduce #7");
    std::this_thread::sleep_for(300ms);
    (void)!write(ready[1], "x", 1);
    for (;;) pause();
  }
  char byte;
  ASSERT_EQ(read(ready[0], &byte, 1), 1);
  EXPECT_EQ(server_->members().at(1).state, MemberState::joined);
  EXPECT_NO_THROW(survivor.check());
  kill(child, SIGSTOP);
  const auto begin = Clock::now();
  std::string error;
  ASSERT_TRUE(eventually([&] {
    error = message_of([&] { survivor.check(); });
    return !error.empty();
  }));
  EXPECT_LT(seconds_since(begin), 5);
  EXPECT_HAS(error, concat("pid ", child, ") was lost: silent for "));
  EXPECT_HAS(error, "rank 1 (host ");
  EXPECT_HAS(error, "its last operation: all_reduce #7");
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  close(ready[0]);
  close(ready[1]);
  const std::lock_guard lock(mutex);
  ASSERT_EQ(told.size(), 1u);
  EXPECT_EQ(told[0].rank, 1);
  EXPECT_EQ(told[0].state, MemberState::lost);
}

TEST_F(Control, WhateverWaitsFailsAtOnceWhenTheLauncherSawARankEnd) {
  serve(3);
  const auto a = join(0, 3), b = join(1, 3);
  std::string get_error, barrier_error;
  const auto begin = Clock::now();
  std::thread getting([&] { get_error = message_of([&] { a->get("from rank 2", 60); }); });
  std::thread waiting([&] { barrier_error = message_of([&] { b->barrier("start", 60); }); });
  std::this_thread::sleep_for(100ms);
  server_->ended(2, false, "ended by signal 9");
  getting.join();
  waiting.join();
  EXPECT_LT(seconds_since(begin), 5);
  for (const std::string& error : {get_error, barrier_error}) EXPECT_HAS(error, "rank 2");
  EXPECT_HAS(get_error, "was lost: ended by signal 9");
  EXPECT_HAS(message_of([&] { a->barrier("later", 60); }), "rank 2");
  EXPECT_HAS(message_of([&] { a->check(); }), "ended by signal 9");
}

TEST_F(Control, ARankThatLeavesSaysWhyAndIsNotLost) {
  serve(2);
  const auto a = join(0, 2);
  {
    const auto b = join(1, 2);
    b->leave("out of data");
    EXPECT_HAS(message_of([&] { b->set("k", "v"); }), "has left the run");
  }
  server_->ended(1, false, "killed");  // it had left before
  EXPECT_NO_THROW(a->check());
  EXPECT_HAS(message_of([&] { a->barrier("end", 60); }), "left: out of data");
  EXPECT_TRUE(eventually([&] { return copy_of(members_).size() >= 3; }));
  const auto seen = copy_of(members_);
  EXPECT_EQ(seen.back().state, MemberState::left);
  EXPECT_EQ(seen.back().reason, "out of data");
}

TEST_F(Control, ARankThatEndedOrderlyWithoutAGoodbyeHasLeft) {
  serve(3);
  const auto a = join(0, 3), b = join(1, 3);
  server_->ended(1, true, "exit code 0");
  server_->ended(2, true, "exit code 0");  // it never joined: not every program does
  EXPECT_HAS(message_of([&] { a->barrier("end", 60); }), "rank 1 (host ");
  EXPECT_NO_THROW(a->check());
  EXPECT_EQ(server_->members().size(), 2u);
}

TEST_F(Control, AnotherRunsIdIsRefusedWithAReasonThatTheClientReports) {
  serve(1);
  ControlClientOptions options = client_options(0, 1);
  options.run_id = std::string(32, 'a');
  const std::string error = message_of([&] { ControlClient client(options); });
  EXPECT_HAS(error, "this server serves run " + keys_.run_id + ", not " + options.run_id);
  EXPECT_EQ(server_->statistics().refused, 1u);
}

TEST_F(Control, ARankThatIsTakenOrOutOfRangeIsRefused) {
  serve(2);
  const auto a = join(0, 2);
  EXPECT_HAS(message_of([&] { join(0, 2); }), "there is already a rank 0");
  EXPECT_HAS(message_of([&] { join(2, 2); }), "rank 2 is outside [0, 2)");
  EXPECT_HAS(message_of([&] { join(-1, 2); }), "rank -1 is outside");
  EXPECT_HAS(message_of([&] { join(1, 3); }), "the run has 2 ranks; this one expects 3");
  EXPECT_EQ(server_->statistics().refused, 4u);
  EXPECT_NO_THROW(a->set("k", "v"));
}

TEST_F(Control, UnknownKeysAreDeniedAndTheClientSaysThatKeysDiffer) {
  serve(1);
  ControlClientOptions wrong_client = client_options(0, 1), wrong_server = wrong_client;
  wrong_client.connect_timeout = wrong_server.connect_timeout = 0.7;
  const ControlKeys other = ControlKeys::make();
  wrong_client.keys.client_public = other.client_public;
  wrong_client.keys.client_secret = other.client_secret;
  EXPECT_HAS(message_of([&] { ControlClient client(wrong_client); }), "it does not know this run's key");
  EXPECT_GE(server_->statistics().denied, 1u);
  wrong_server.keys.server_public = other.server_public;
  EXPECT_HAS(message_of([&] { ControlClient client(wrong_server); }), "do both sides have the same keys");
  EXPECT_TRUE(server_->members().empty());
}

TEST_F(Control, APlaintextPeerIsRefused) {
  serve(1);
  zmq::context_t context;
  zmq::socket_t plain(context, zmq::socket_type::dealer);
  plain.set(zmq::sockopt::linger, 0);
  plain.connect("tcp://" + address_of(*server_));
  Message hello{MessageKind::hello, 1, keys_.run_id, FieldWriter().number(0).number(1).text("h").number(1).take()};
  plain.send(zmq::buffer(encode(hello)), zmq::send_flags::dontwait);
  EXPECT_TRUE(eventually([&] { return server_->statistics().failed_handshakes > 0; }));
  EXPECT_TRUE(server_->members().empty());
}

TEST_F(Control, AClientSaysWhenNobodyListens) {
  serve(1);
  ControlClientOptions options = client_options(0, 1);
  server_.reset();
  options.connect_timeout = 0.5;
  EXPECT_HAS(message_of([&] { ControlClient client(options); }), "nobody listens there");
  options.address = "no address";
  EXPECT_HAS(message_of([&] { ControlClient client(options); }), "an address is HOST:PORT");
}

TEST_F(Control, AClientNoticesThatTheServerIsGone) {
  serve(1, 0.4);
  const auto a = join(0, 1);
  std::string waiting_error;
  std::thread waiting([&] { waiting_error = message_of([&] { a->get("k", 60); }); });
  std::this_thread::sleep_for(50ms);
  const auto begin = Clock::now();
  server_.reset();
  waiting.join();
  EXPECT_LT(seconds_since(begin), 5);
  EXPECT_HAS(waiting_error, "has been silent for");
  EXPECT_HAS(message_of([&] { a->check(); }), "has been silent for");
}

TEST_F(Control, LogAndMetricLinesArriveInOrderWithTheirRank) {
  serve(2);
  const auto a = join(0, 2), b = join(1, 2);
  for (int i = 0; i < 100; ++i) {
    a->log(log::Level::kWarn, "line " + std::to_string(i));
    b->metric(concat("{\"step\": ", i, "}"));
  }
  ASSERT_TRUE(eventually([&] { return copy_of(logs_).size() == 100 && copy_of(metrics_).size() == 100; }));
  const auto logs = copy_of(logs_);
  const auto metrics = copy_of(metrics_);
  for (size_t i = 0; i < 100; ++i) {
    EXPECT_EQ(logs[i].rank, 0);
    EXPECT_EQ(logs[i].level, log::Level::kWarn);
    EXPECT_EQ(logs[i].text, "line " + std::to_string(i));
    EXPECT_GT(logs[i].microseconds, int64_t{1'600'000'000} * 1'000'000);
    EXPECT_EQ(metrics[i].rank, 1);
    EXPECT_EQ(metrics[i].json, concat("{\"step\": ", i, "}"));
  }
  for (const char* wrong : {"", "[1]", "{\"a\": }", "{} {}", "1"}) {
    EXPECT_HAS(message_of([&] { b->metric(wrong); }), "must be one JSON object");
  }
}

TEST_F(Control, BrokenFramesOfAPeerWithTheRightKeyAreCountedAndDropped) {
  serve(2);
  const auto live = join(0, 2);
  zmq::context_t context;
  zmq::socket_t socket = raw_socket(context);
  uint64_t sent = 0;
  const auto send = [&](std::string frame) {
    socket.send(zmq::buffer(frame), zmq::send_flags::none);
    ++sent;
  };
  const auto message = [&](MessageKind kind, std::string payload) {
    return encode({kind, 1, keys_.run_id, std::move(payload)});
  };
  const std::string beat = message(MessageKind::beat, FieldWriter().text("x").take());
  send(beat);  // before the hello
  send("");
  send("short");
  const std::string hello = message(MessageKind::hello, FieldWriter().number(1).number(2).text("h").number(1).take());
  send(hello.substr(0, hello.size() - 1));
  send(hello + "x");
  socket.send(zmq::buffer(hello), zmq::send_flags::none);
  for (const size_t at : {0u, 4u, 6u, 12u}) {  // magic, version, kind, length
    std::string broken = beat;
    broken[at] = '\x7f';
    send(broken);
  }
  std::string huge = beat;  // a length that is longer than the rest
  huge[12 + 3] = '\x7f';
  send(huge);
  std::string text = beat;  // the same inside
  text[kHeaderBytes + 3] = '\x7f';
  send(text);
  send(message(MessageKind::get, FieldWriter().text(std::string(kMaxKey + 1, 'k')).number(0).take()));
  send(message(MessageKind::get, FieldWriter().text("k").number(-1).take()));
  send(message(MessageKind::log, FieldWriter().number(9).number(0).text("l").take()));
  send(message(MessageKind::metric, FieldWriter().number(0).text("{").take()));
  send(message(MessageKind::metric, FieldWriter().number(0).text("[]").take()));
  send(message(MessageKind::welcome, FieldWriter().number(1).take()));
  send(message(MessageKind::beat, FieldWriter().text("x").text("y").take()));
  std::string parts = beat;
  socket.send(zmq::buffer(parts), zmq::send_flags::sndmore);
  send(parts);
  std::mt19937 random(1);
  for (int i = 0; i < 2000; ++i) {  // a message in which some bytes are wrong, beyond the magic at least one
    std::string broken = hello;
    for (int flips = 0; flips < 4; ++flips) broken[random() % broken.size()] ^= static_cast<char>(1 + random() % 255);
    broken[4] = '\x55';
    send(broken);
  }
  EXPECT_TRUE(eventually([&] { return server_->statistics().malformed >= sent; })) << server_->statistics().malformed;
  EXPECT_EQ(server_->statistics().malformed, sent);
  EXPECT_EQ(server_->members().size(), 2u);
  EXPECT_NO_THROW(live->set("k", "v"));
}

TEST_F(Control, AMessageLargerThanTheLimitEndsItsConnectionOnly) {
  serve(2);
  const auto live = join(0, 2);
  zmq::context_t context;
  zmq::socket_t socket = raw_socket(context);
  socket.set(zmq::sockopt::linger, 0);
  socket.send(zmq::buffer(std::string(8 << 20, 'x')), zmq::send_flags::none);
  std::this_thread::sleep_for(300ms);
  EXPECT_EQ(live->find("k"), std::nullopt);
  live->set("k", "v");
  EXPECT_EQ(server_->members().size(), 1u);
}

TEST_F(Control, AThousandHostileConnectionsDisturbNoLiveRunAndTakeLittleMemory) {
  weft::testing::allow_many_connections();
  int to_child[2];
  ASSERT_EQ(pipe(to_child), 0);
  const pid_t attacker = fork();  // before there are threads
  if (attacker == 0) {
    int port = 0;
    if (read(to_child[0], &port, sizeof port) != sizeof port) _exit(2);
    weft::testing::attack(port, keys_, [&] {
      char released;
      (void)!read(to_child[0], &released, 1);
    });
    _exit(0);
  }
  constexpr int kRanks = 4;
  serve(kRanks);
  std::vector<std::unique_ptr<ControlClient>> ranks;
  for (int rank = 0; rank < kRanks; ++rank) ranks.push_back(join(rank, kRanks));
  std::atomic<bool> stop = false;
  std::atomic<int> rounds = 0;
  std::atomic<double> slowest = 0;
  std::vector<std::thread> threads;
  std::vector<std::string> errors(kRanks);
  for (int rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      errors[static_cast<size_t>(rank)] = message_of([&] {
        for (int round = 0;; ++round) {
          const auto begin = Clock::now();
          // Rank 0 decides, so that all ranks end after the same round.
          if (rank == 0) ranks[0]->set("go " + std::to_string(round), stop ? "no" : "yes");
          if (ranks[static_cast<size_t>(rank)]->get("go " + std::to_string(round), 60) == "no") return;
          ranks[static_cast<size_t>(rank)]->barrier("round", 60);
          if (rank == 0) {
            ++rounds;
            slowest = std::max(slowest.load(), seconds_since(begin));
          }
        }
      });
    });
  }
  ASSERT_TRUE(eventually([&] { return rounds > 20; }, 30s));
  const int64_t before = weft::testing::resident_bytes(getpid());
  const int rounds_before = rounds;
  const int port = server_->port();
  ASSERT_EQ(write(to_child[1], &port, sizeof port), static_cast<ssize_t>(sizeof port));
  int64_t most = before;
  const auto look = [&] {
    most = std::max(most, weft::testing::resident_bytes(getpid()));
    std::this_thread::sleep_for(5ms);
  };
  for (const auto begin = Clock::now(); seconds_since(begin) < 3;) look();
  // A busy machine takes longer for that many handshakes.
  for (const auto begin = Clock::now(); server_->statistics().denied < 250 && seconds_since(begin) < 30;) look();
  ASSERT_EQ(write(to_child[1], "x", 1), 1);
  int status = 0;
  while (waitpid(attacker, &status, WNOHANG) == 0) look();
  const int during = rounds - rounds_before;
  stop = true;
  for (std::thread& thread : threads) thread.join();
  close(to_child[0]);
  close(to_child[1]);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  for (const std::string& error : errors) EXPECT_EQ(error, "");
  for (const auto& rank : ranks) EXPECT_NO_THROW(rank->check());
  const ControlStatistics statistics = server_->statistics();
  RecordProperty("grown_bytes", std::to_string(most - before));
  std::printf("grown by %.1f MiB; %d rounds meanwhile, the slowest took %.3f s; %llu denied, %llu failed handshakes\n",
              static_cast<double>(most - before) / (1 << 20), during, slowest.load(),
              static_cast<unsigned long long>(statistics.denied),
              static_cast<unsigned long long>(statistics.failed_handshakes));
#ifndef __SANITIZE_ADDRESS__  // which keeps freed memory
  EXPECT_LE(most - before, 16 << 20);
#endif
  EXPECT_GE(during, 10);
  EXPECT_LT(slowest, 3);
  EXPECT_EQ(statistics.denied, 250u);
  EXPECT_EQ(statistics.malformed, 0u);
  EXPECT_EQ(server_->members().size(), static_cast<size_t>(kRanks));
}

TEST_F(Control, KeysTravelInAFileThatOnlyItsOwnerMayRead) {
  const std::filesystem::path directory =
      std::filesystem::temp_directory_path() / ("weft-keys-" + std::to_string(getpid()));
  std::filesystem::create_directory(directory);
  const std::string path = (directory / "keys").string();
  keys_.for_client().write(path);
  struct stat status{};
  ASSERT_EQ(stat(path.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0600u);
  const ControlKeys read = ControlKeys::read(path);
  EXPECT_EQ(read.run_id, keys_.run_id);
  EXPECT_EQ(read.client_secret, keys_.client_secret);
  EXPECT_EQ(read.server_public, keys_.server_public);
  EXPECT_EQ(read.server_secret, "");
  EXPECT_EQ(read_file(path).find(keys_.server_secret), std::string::npos);
  EXPECT_HAS(message_of([&] { keys_.write(path); }), "never overwritten");
  chmod(path.c_str(), 0640);
  EXPECT_HAS(message_of([&] { ControlKeys::read(path); }), "must be this user's and of mode 0600");
  chmod(path.c_str(), 0600);
  const std::string good = read_file(path);
  std::mt19937 random(3);
  for (int i = 0; i < 300; ++i) {  // cut anywhere, or one byte wrong: refused, or other keys, never a crash
    std::string text = good.substr(0, random() % good.size());
    if (i % 2 == 0) (text = good)[random() % good.size()] ^= static_cast<char>(0x80);
    std::ofstream(path) << text;
    if (text != good.substr(0, good.size() - 1))
      EXPECT_HAS(message_of([&] { ControlKeys::read(path); }), "not a file of keys");
  }
  EXPECT_HAS(message_of([&] { ControlKeys::read(path + ".none"); }), "cannot be opened");
  std::filesystem::remove_all(directory);
}

TEST_F(Control, RankZeroServesWhereTheLauncherDoesNot) {
  const std::filesystem::path directory =
      std::filesystem::temp_directory_path() / ("weft-serve-" + std::to_string(getpid()));
  std::filesystem::create_directory(directory);
  const std::string path = (directory / "keys").string();
  keys_.write(path);
  const int port = serve(1).port();
  server_.reset();  // a port that was free a moment ago
  LaunchInfo info;
  info.launcher = Launcher::slurm;
  info.world_size = 3;
  info.rendezvous = "127.0.0.1:" + std::to_string(port);
  info.job = "Slurm 7.0";
  info.keys_file = path;
  std::vector<std::string> errors(3), got(3);
  std::vector<std::thread> ranks;
  for (int rank = 2; rank >= 0; --rank) {
    ranks.emplace_back([&, rank] {
      errors[static_cast<size_t>(rank)] = message_of([&] {
        LaunchInfo mine = info;
        mine.rank = rank;
        const auto client = ControlClient::connect(mine, 20);
        if (rank == 0) client->set("k", "v");
        got[static_cast<size_t>(rank)] = client->get("k", 10);
        client->barrier("all", 20);
        if (rank == 2) std::this_thread::sleep_for(300ms);  // the server outlives rank 0's own work
        client->find("k");
      });
    });
  }
  for (std::thread& rank : ranks) rank.join();
  for (const std::string& error : errors) EXPECT_EQ(error, "");
  EXPECT_EQ(got, (std::vector<std::string>(3, "v")));
  info.keys_file = "";
  EXPECT_HAS(message_of([&] { ControlClient::connect(info); }), "weft launch --make-keys FILE");
  std::filesystem::remove_all(directory);
}

}  // namespace
