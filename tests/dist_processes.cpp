#include "tests/dist_processes.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <thread>
#include <utility>

#include "dist/group_error.h"

namespace weft::dist::testing {

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

namespace {

constexpr char kFailedAt[] = "GroupError at ";

std::string content(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

double since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// --rank RANK SIZE HEARTBEAT SILENCE TIMEOUT CONNECT_TIMEOUT DIRECTORY WORD...
int rank_main(int argc, char** argv) {
  RankArguments arguments;
  arguments.options.rank = std::atoi(argv[2]);
  arguments.options.size = std::atoi(argv[3]);
  arguments.options.heartbeat = std::atof(argv[4]);
  arguments.options.silence = std::atof(argv[5]);
  arguments.options.timeout = std::atof(argv[6]);
  arguments.options.connect_timeout = std::atof(argv[7]);
  const std::filesystem::path directory = argv[8];
  arguments.store = directory / "store";
  arguments.output = directory / concat("output.", arguments.options.rank);
  arguments.words.assign(argv + 9, argv + argc);
  try {
    return run_rank(arguments);
  } catch (const GroupError& error) {
    std::fprintf(stderr, "%s%f, rank at fault %d: %s\n", kFailedAt, steady_seconds(), error.rank(), error.what());
    return 7;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
}

}  // namespace

Processes::Processes(int size, const std::vector<std::vector<std::string>>& words, const ProcessOptions& options)
    : start_(std::chrono::steady_clock::now()) {
  std::string name = (std::filesystem::temp_directory_path() / "weft-dist-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no directory for the test");
  directory_ = name;
  for (int rank = 0; rank < size; ++rank) {
    std::vector<std::string> args = {"/proc/self/exe",
                                     "--rank",
                                     std::to_string(rank),
                                     std::to_string(size),
                                     std::to_string(options.heartbeat),
                                     std::to_string(options.silence),
                                     std::to_string(options.timeout),
                                     std::to_string(options.connect_timeout),
                                     name};
    const auto& mine = words[words.size() == 1 ? 0 : static_cast<size_t>(rank)];
    args.insert(args.end(), mine.begin(), mine.end());
    std::vector<char*> argv;
    for (std::string& arg : args) argv.push_back(arg.data());
    argv.push_back(nullptr);
    const std::string err = directory_ / concat("err.", rank);
    const pid_t parent = getpid(), pid = fork();
    if (pid < 0) throw std::runtime_error("fork failed");
    if (pid == 0) {
      // Whatever ends the test ends its ranks.
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      setenv("TMPDIR", name.c_str(), 1);  // what a rank leaves in it is seen
      if (getppid() == parent && dup2(open(err.c_str(), O_WRONLY | O_CREAT, 0666), 2) == 2) execv(argv[0], argv.data());
      _exit(127);
    }
    pids_.push_back(pid);
  }
}

void Processes::end_all() {
  for (pid_t& pid : pids_) {
    if (pid == 0) continue;
    kill(pid, SIGKILL);
    waitpid(std::exchange(pid, 0), nullptr, 0);
  }
}

std::string Processes::left_behind() const {
  std::string found;
  const std::filesystem::path store = directory_ / "store";
  for (const auto& entry : std::filesystem::directory_iterator(store)) {
    const std::string name = entry.path().filename().string();
    if (name.find(".tmp") != std::string::npos) found += ' ' + name;
    if (!name.starts_with("address.")) continue;
    const std::string address = content(entry.path());  // "127.0.0.1 PORT"
    sockaddr_in where{};
    where.sin_family = AF_INET;
    where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    where.sin_port = htons(static_cast<uint16_t>(std::atoi(address.c_str() + address.find(' '))));
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, reinterpret_cast<sockaddr*>(&where), sizeof where) == 0) found += " port " + address;
    close(fd);
  }
  for (const auto& entry : std::filesystem::directory_iterator(directory_)) {
    const std::string name = entry.path().filename().string();
    if (name != "store" && !name.starts_with("err.") && !name.starts_with("output.")) found += ' ' + name;
  }
  return found;
}

Processes::~Processes() {
  end_all();
  std::error_code ignored;
  std::filesystem::remove_all(directory_, ignored);
}

void Processes::send(int rank, int signal) const {
  if (const pid_t pid = pids_[static_cast<size_t>(rank)]; pid != 0) kill(pid, signal);
}

Processes::Outcome Processes::wait(int rank, double seconds) {
  pid_t& pid = pids_[static_cast<size_t>(rank)];
  Outcome outcome;
  int status = 0;
  const auto start = std::chrono::steady_clock::now();
  while (waitpid(pid, &status, WNOHANG) != pid) {
    if (since(start) > seconds) {
      outcome.timed_out = true;
      kill(pid, SIGKILL);
      waitpid(pid, &status, 0);
      break;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  pid = 0;
  outcome.seconds = since(start_);
  outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  outcome.err = content(directory_ / concat("err.", rank));
  outcome.output = content(directory_ / concat("output.", rank));
  if (const size_t at = outcome.err.find(kFailedAt); at != std::string::npos)
    outcome.failed_at = std::atof(outcome.err.c_str() + at + sizeof kFailedAt - 1);
  return outcome;
}

std::vector<Processes::Outcome> Processes::wait_all(double seconds) {
  std::vector<Outcome> outcomes;
  for (size_t rank = 0; rank < pids_.size(); ++rank) outcomes.push_back(wait(static_cast<int>(rank), seconds));
  return outcomes;
}

}  // namespace weft::dist::testing

int main(int argc, char** argv) {
  if (argc > 8 && std::strcmp(argv[1], "--rank") == 0) return weft::dist::testing::rank_main(argc, argv);
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
