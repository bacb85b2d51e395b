#pragma once
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

/// Runs the `weft` program as a user does: a process of its own, in a directory of its own.
namespace weft::apps_test {

namespace fs = std::filesystem;
using Args = std::vector<std::string>;

inline std::string content_of(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

inline void write_content(const fs::path& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

/// A directory of the test's own.
class Scratch {
 public:
  Scratch() {
    std::string name = (fs::temp_directory_path() / "weft-apps-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no scratch directory");
    path_ = name;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

struct Outcome {
  int code = 0;  ///< exit code; minus the signal that ended the process
  std::string out, err;
  bool timed_out = false;
};

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline void sleep_seconds(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

/// A running `weft`. Its output goes to files beside, not in, its working directory.
class Process {
 public:
  Process(const fs::path& directory, const Args& args, const Args& environment = {}, const std::string& input = "") {
    write_content(io_.path() / "in", input);
    Args all = {WEFT_BINARY};
    all.insert(all.end(), args.begin(), args.end());
    // One place for the machine's speed: it is measured once a test.
    static const Scratch cache;
    Args variables = {"PATH=/usr/bin:/bin", "HOME=/nonexistent", "WEFT_CACHE_DIR=" + cache.path().string()};
    variables.insert(variables.end(), environment.begin(), environment.end());
    std::vector<char*> argv, envp;
    for (std::string& word : all) argv.push_back(word.data());
    for (std::string& word : variables) envp.push_back(word.data());
    argv.push_back(nullptr), envp.push_back(nullptr);
    const std::string in = (io_.path() / "in").string(), out = (io_.path() / "out").string();
    const std::string err = (io_.path() / "err").string();
    pid_ = fork();
    if (pid_ < 0) throw std::runtime_error("fork failed");
    if (pid_ != 0) return;
    const bool ready = chdir(directory.c_str()) == 0 && dup2(open(in.c_str(), O_RDONLY), 0) == 0 &&
                       dup2(open(out.c_str(), O_WRONLY | O_CREAT, 0666), 1) == 1 &&
                       dup2(open(err.c_str(), O_WRONLY | O_CREAT, 0666), 2) == 2;
    if (ready) execve(argv[0], argv.data(), envp.data());
    _exit(127);
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;
  ~Process() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }

  void send(int signal) const {
    if (pid_ > 0) kill(pid_, signal);
  }
  bool running() {
    if (pid_ > 0 && waitpid(pid_, &status_, WNOHANG) == pid_) pid_ = 0;
    return pid_ > 0;
  }
  pid_t pid() const { return pid_; }
  std::string err() const { return content_of(io_.path() / "err"); }

  /// Waits for the end; ends the process if that takes longer.
  Outcome wait(double seconds = 60) {
    Outcome outcome;
    for (const double deadline = now() + seconds; running();) {
      if (now() > deadline) {
        outcome.timed_out = true;
        kill(pid_, SIGKILL);
        waitpid(pid_, &status_, 0);
        pid_ = 0;
        break;
      }
      sleep_seconds(0.002);
    }
    outcome.code = WIFEXITED(status_) ? WEXITSTATUS(status_) : -WTERMSIG(status_);
    outcome.out = content_of(io_.path() / "out");
    outcome.err = err();
    return outcome;
  }

 private:
  Scratch io_;
  pid_t pid_ = 0;
  int status_ = 0;
};

inline Outcome run_weft(const fs::path& directory, const Args& args, const Args& environment = {},
                        const std::string& input = "", double seconds = 60) {
  return Process(directory, args, environment, input).wait(seconds);
}

/// The same, for steps that a test rests on.
inline Outcome must_run(const fs::path& directory, const Args& args, const Args& environment = {}) {
  const Outcome outcome = run_weft(directory, args, environment);
  if (outcome.code != 0) throw std::runtime_error(args[0] + " failed: " + outcome.out + outcome.err);
  return outcome;
}

/// Some kilobytes of sentences that a model can learn something from; the same each time.
inline std::string small_text(size_t bytes = 6000) {
  static const char* const kSubjects[] = {"the shepherd", "a king", "the river", "my brother", "an old woman"};
  static const char* const kVerbs[] = {"saw", "followed", "feared", "remembered", "crossed"};
  static const char* const kObjects[] = {"the mountain", "seven ships", "the caf\xc3\xa9", "a burning field", "no one"};
  std::mt19937 random(11);
  std::string text;
  while (text.size() < bytes) {
    text += std::string(kSubjects[random() % 5]) + ' ' + kVerbs[random() % 5] + ' ' + kObjects[random() % 5] + ".\n";
  }
  return text;
}

/// A model of some thousand parameters: its steps take about a millisecond.
inline const Args kSmallModel = {"--layers",  "2", "--heads", "2", "--width",   "16",
                                 "--context", "8", "--batch", "4", "--dropout", "0.1"};

inline Args operator+(Args a, const Args& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

/// A directory with text.txt and data/, made once a program: where to train.
inline const fs::path& workplace() {
  static const Scratch scratch;
  static const bool made = [] {
    write_content(scratch.path() / "text.txt", small_text());
    must_run(scratch.path(), {"data", "prepare", "--text", "text.txt", "--out", "data", "--vocab", "300"});
    return true;
  }();
  (void)made;
  return scratch.path();
}

}  // namespace weft::apps_test
