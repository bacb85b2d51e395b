// weft launch: starts the ranks of a run, keeps their output apart, and ends all of them when one fails.
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <iostream>

#include "apps/commands.h"
#include "apps/launch_nodes.h"
#include "apps/options.h"
#include "core/thread_pool.h"

namespace weft::apps {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr int kTick = 100;  // milliseconds between two looks at the other nodes
constexpr double kStoppedMargin = 0.3;

Clock::duration seconds_of(double value) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(value));
}

struct LaunchOptions {
  int64_t ranks = 1, nodes = 1, node_rank = 0, restarts = 0;
  std::string rendezvous, elastic;
  fs::path keys, metrics;
  double heartbeat = 4, grace = 10, join = 60;
  std::string make_keys;
  std::vector<std::string> command;

  void declare(Options& options) {
    options.add("ranks", &ranks, {.min = 1, .max = 4096}, "ranks to start on this machine; -n is short for it");
    options.add("nodes", &nodes, {.min = 1, .max = 65536}, "machines of the run, each with a weft launch of its own");
    options.add("node_rank", &node_rank, {.min = 0, .max = 65535}, "which of them this is, from 0");
    options.add("rendezvous", &rendezvous, {.placeholder = "HOST:PORT"},
                "where the launcher of node 0 listens for the others; needed with several nodes");
    options.add(
        "keys", &keys, {.placeholder = "FILE"},
        "keys that the launchers share, made with --make-keys; needed with several nodes, else made for the run");
    options.add("restarts", &restarts, {.min = 0, .max = 1'000'000},
                "how often the run is started again after a rank has failed; weft train then resumes");
    options.add(
        "elastic", &elastic, {.placeholder = "MIN:MAX"},
        "ranks of the whole run: a restart goes without machines that are gone, and with one rank fewer for each "
        "that was killed or fell silent, if MIN are left; it uses at most MAX");
    options.add("heartbeat", &heartbeat, {.min = 0.1, .max = 86400, .unit = "seconds"},
                "a rank that joined the control plane and is silent for so long is lost");
    options.add("grace", &grace, {.min = 0, .max = 86400, .unit = "seconds"},
                "what ranks get between SIGTERM and SIGKILL when another has failed");
    options.add("join", &join, {.min = 0.1, .max = 86400, .unit = "seconds"},
                "how long to wait for the launchers of other nodes");
    options.add("metrics", &metrics, {.placeholder = "FILE"}, "appends the ranks' metric records as JSON lines");
    options.action("make_keys", &make_keys, "FILE", "only makes a file of keys, readable by you alone");
    options.positional_list(
        "command", &command, {},
        "what every rank runs, after --: a weft command with its options, or a program with its arguments");
  }

  std::optional<std::pair<int, int>> elastic_range(const Options& options) const {
    if (elastic.empty()) return std::nullopt;
    const size_t colon = elastic.find(':');
    int low = 0, high = 0;
    const char* const begin = elastic.data();
    const char* const end = begin + elastic.size();
    bool good = colon != std::string::npos;
    if (good) {
      const auto first = std::from_chars(begin, begin + colon, low);
      const auto second = std::from_chars(begin + colon + 1, end, high);
      good = first.ec == std::errc() && first.ptr == begin + colon && second.ec == std::errc() && second.ptr == end;
    }
    if (!good || low < 1 || high < low) {
      options.reject("elastic", weft::quoted(elastic), " must be MIN:MAX with 1 <= MIN <= MAX");
    }
    if (nodes == 1 && ranks < low) options.reject("elastic", "asks for at least ", low, " ranks, got ranks = ", ranks);
    return std::pair(low, high);
  }

  void check(const Options& options) const {
    if (node_rank >= nodes) options.reject("node_rank", node_rank, " must be below nodes = ", nodes);
    if (nodes == 1 && !rendezvous.empty()) options.reject("rendezvous", "is for several nodes");
    if (nodes > 1) {
      const size_t colon = rendezvous.rfind(':');
      int port = 0;
      const char* const end = rendezvous.data() + rendezvous.size();
      const bool good = colon != std::string::npos && colon > 0 &&
                        std::from_chars(rendezvous.data() + colon + 1, end, port).ptr == end && port > 0 &&
                        port < 65536;
      if (!good) options.reject("rendezvous", weft::quoted(rendezvous), " must be HOST:PORT of node 0's launcher");
      if (keys.empty()) {
        options.reject("keys",
                       "must name a file that all launchers can read. Hint: weft launch --make-keys FILE makes one");
      }
    }
    if (command.empty()) {
      fail(ErrorKind::kUsage, "command line", "there is nothing to launch. Hint: weft launch -n 4 -- train ...");
    }
    if (command[0] == "launch") fail(ErrorKind::kUsage, "command line", "a launch cannot be launched");
  }
};

/// -n 4, -n4 and -n=4 before the -- as --ranks.
std::vector<std::string> with_long_names(std::span<const std::string> args) {
  std::vector<std::string> out(args.begin(), args.end());
  for (std::string& arg : out) {
    if (arg == "--") break;
    if (arg == "-n") {
      arg = "--ranks";
    } else if (arg.starts_with("-n")) {
      arg = "--ranks=" + arg.substr(arg[2] == '=' ? 3 : 2);
    }
  }
  return out;
}

bool executable(const fs::path& path) {
  std::error_code ignored;
  return fs::is_regular_file(path, ignored) && access(path.c_str(), X_OK) == 0;
}

/// A command of this program, else a program as a shell finds it.
RankCommand resolved(const std::vector<std::string>& words) {
  const auto own = commands();
  if (std::any_of(own.begin(), own.end(), [&](const Command& each) { return each.name == words[0]; })) {
    RankCommand command{fs::read_symlink("/proc/self/exe").string(), {"weft"}};
    command.words.insert(command.words.end(), words.begin(), words.end());
    return command;
  }
  if (words[0].find('/') != std::string::npos) {
    if (executable(words[0])) return {words[0], words};
    fail(ErrorKind::kUsage, "launch", weft::quoted(words[0]), " is no program that can be run");
  }
  const char* const path = std::getenv("PATH");
  std::string directories = path != nullptr ? path : "/usr/bin:/bin";
  for (size_t begin = 0; begin <= directories.size();) {
    const size_t end = std::min(directories.find(':', begin), directories.size());
    const fs::path file = fs::path(directories.substr(begin, end - begin)) / words[0];
    if (end > begin && executable(file)) return {file.string(), words};
    begin = end + 1;
  }
  std::vector<std::string> names;
  for (const Command& each : own) names.emplace_back(each.name);
  fail(ErrorKind::kUsage, "launch", weft::quoted(words[0]), " is neither a command of weft nor a program in PATH",
       did_you_mean(words[0], names));
}

/// A directory of this launch with the ranks' keys: in a file, which children and logs do not inherit as they do an
/// environment.
class KeysFile {
 public:
  explicit KeysFile(const dist::ControlKeys& keys) {
    std::string name = (fs::temp_directory_path() / "weft-launch-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) fail(ErrorKind::kIo, "launch", name, ": no directory can be made");
    directory_ = name;
    file_ = name + "/keys";
    keys.for_client().write(file_);
  }
  KeysFile(const KeysFile&) = delete;
  KeysFile& operator=(const KeysFile&) = delete;
  ~KeysFile() {
    std::error_code ignored;
    fs::remove_all(directory_, ignored);
  }
  const std::string& file() const { return file_; }
  const std::string& directory() const { return directory_; }

 private:
  std::string directory_, file_;
};

std::vector<Environment> environments_of(const LaunchOptions& o, const LaunchPlan& plan, const std::string& keys_file) {
  Environment common = weft::process_environment("");
  const auto set = [](Environment& environment, const char* name, const std::string& value) {
    std::erase_if(environment, [&](const Variable& each) { return each.name == name; });
    environment.push_back({name, value});
  };
  set(common, "WEFT_WORLD_SIZE", std::to_string(plan.world_size));
  set(common, "WEFT_NODE_RANK", std::to_string(o.node_rank));
  set(common, "WEFT_RENDEZVOUS", plan.rendezvous);
  set(common, "WEFT_RUN_ID", plan.run_id);
  set(common, "WEFT_KEYS", keys_file);
  std::erase_if(common, [](const Variable& each) { return each.name == "WEFT_RESTART"; });
  if (o.restarts > 0) set(common, "WEFT_RESTART", std::to_string(plan.attempt));
  std::erase_if(common, [](const Variable& each) { return each.name == "WEFT_ELASTIC"; });
  if (!o.elastic.empty()) set(common, "WEFT_ELASTIC", "1");
  if (find_variable(common, "WEFT_NUM_THREADS") == nullptr) {
    set(common, "WEFT_NUM_THREADS", std::to_string(std::max(1, available_processors() / plan.ranks)));
  }
  std::vector<Environment> all;
  for (int local = 0; local < plan.ranks; ++local) {
    Environment& environment = all.emplace_back(common);
    set(environment, "WEFT_RANK", std::to_string(plan.first_rank + local));
    set(environment, "WEFT_LOCAL_RANK", std::to_string(local));
  }
  return all;
}

/// One start, to its end. The first signal asks the ranks, the second kills them.
void run_once(const LaunchOptions& o, const LaunchPlan& plan, const RankCommand& command, const std::string& keys_file,
              LaunchNodes& nodes, LaunchOutput& output, LaunchSignals& signals, LaunchGuard& guard, bool terminal,
              int& asked) {
  RankProcesses ranks(command, plan.first_rank, environments_of(o, plan, keys_file), output, guard, terminal);
  std::optional<Clock::time_point> kill_at;
  bool killed = false;
  const auto forward = [&](int signal) {
    killed = killed || asked != 0;
    asked = signal;
    nodes.asked(signal);
    ranks.send(killed ? SIGKILL : signal);
  };
  for (auto look_at = Clock::now(); ranks.running() > 0;) {
    std::vector<RankEnd> ends = ranks.wait(kTick, signals);
    // Of those that are seen together, one that a signal ended came before those that end because of it.
    std::stable_partition(ends.begin(), ends.end(), [](const RankEnd& end) { return end.signalled(); });
    for (const RankEnd& end : ends) nodes.ended(end);
    // One that never joined is missed by no control plane; one that did has been declared lost by then.
    for (const int rank : ranks.stopped_for(seconds_of(o.heartbeat + kStoppedMargin))) {
      output.note(concat("rank ", rank, " has been stopped by a signal for more than ", o.heartbeat, " s: SIGKILL"));
      ranks.kill_rank(rank);
    }
    while (const int signal = signals.take()) forward(signal);
    if (output.broken() && asked == 0) forward(SIGHUP);
    const auto now = Clock::now();
    if (now >= look_at) {
      if (const int signal = nodes.forwarded()) forward(signal);
    }
    const bool failing = (now >= look_at || ranks.running() == 0 || o.nodes == 1) && nodes.failing();
    if (now >= look_at) look_at = now + std::chrono::milliseconds(kTick);
    if (failing && !kill_at) {
      ranks.send(SIGTERM);
      kill_at = now + seconds_of(o.grace);
    }
    if (kill_at && now >= *kill_at && !killed) {
      killed = true;
      if (ranks.running() > 0) output.note(concat(ranks.running(), " ranks did not end in ", o.grace, " s: SIGKILL"));
      ranks.send(SIGKILL);
    }
  }
}

}  // namespace

int run_launch(std::span<const std::string> args) {
  LaunchOptions o;
  Options options("launch", "Starts the ranks of a run and ends all of them when one fails.");
  o.declare(options);
  if (!options.parse(with_long_names(args))) return 0;
  if (!o.make_keys.empty()) {
    dist::ControlKeys::make().write(o.make_keys);
    std::cout << "written: " << o.make_keys << "\n";
    return 0;
  }
  o.check(options);
  RankCommand command = resolved(o.command);

  LaunchNodesOptions n;
  n.nodes = static_cast<int>(o.nodes);
  n.node_rank = static_cast<int>(o.node_rank);
  n.ranks = static_cast<int>(o.ranks);
  n.rendezvous = o.rendezvous;
  n.restarts = static_cast<int>(o.restarts);
  n.elastic = o.elastic_range(options);
  n.silence = o.heartbeat;
  n.join_timeout = o.join;
  n.metrics = o.metrics.string();
  n.keys = o.keys.empty() ? dist::ControlKeys::make() : dist::ControlKeys::read(o.keys.string());

  // Connections and pipes of many ranks, and whoever else connects, are many descriptors. Ranks get the limit as it
  // was.
  rlimit& limit = command.open_files;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) fail(ErrorKind::kIo, "launch", "the limit of open files cannot be read");
  const rlimit most{limit.rlim_max, limit.rlim_max};
  setrlimit(RLIMIT_NOFILE, &most);
  const char* const term = std::getenv("TERM");
  const bool terminal =
      isatty(STDERR_FILENO) == 1 && term != nullptr && *term != '\0' && std::string_view(term) != "dumb";
  const KeysFile keys_file(n.keys);
  LaunchGuard guard(keys_file.file(), keys_file.directory());
  LaunchSignals signals;
  LaunchOutput output(terminal);
  const std::unique_ptr<LaunchNodes> nodes = LaunchNodes::make(n, output, signals);
  int asked = 0;
  while (const std::optional<LaunchPlan> plan = nodes->next()) {
    if (plan->ranks > 0) run_once(o, *plan, command, keys_file.file(), *nodes, output, signals, guard, terminal, asked);
    nodes->done();
  }
  return nodes->code();
}

}  // namespace weft::apps
