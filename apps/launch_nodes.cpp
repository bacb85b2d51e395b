#include "apps/launch_nodes.h"

#include <atomic>
#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "core/error.h"

namespace weft::apps {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::json;

constexpr auto kPoll = std::chrono::milliseconds(20);
constexpr double kEndSeconds = 5;  // for the others to see that the run is over

std::string key(const char* what, int attempt) { return concat(what, '/', attempt); }
std::string key(const char* what, int attempt, int who) { return concat(what, '/', attempt, '/', who); }

/// A message of another launcher of the run.
Json parsed(const std::string& text) {
  Json json = Json::parse(text, nullptr, false);
  if (!json.is_object()) fail(ErrorKind::kData, "launch", "another launcher sent ", weft::quoted(text));
  return json;
}

std::pair<std::string, int> split(const std::string& rendezvous) {
  const size_t colon = rendezvous.rfind(':');
  return {rendezvous.substr(0, colon), std::atoi(rendezvous.c_str() + colon + 1)};
}

class FirstNode final : public LaunchNodes {
 public:
  FirstNode(const LaunchNodesOptions& options, LaunchOutput& output, LaunchSignals& signals)
      : o_(options), output_(output), signals_(signals) {
    if (!o_.metrics.empty()) {
      metrics_.open(o_.metrics, std::ios::app);
      if (!metrics_) fail(ErrorKind::kIo, "launch", "metrics = ", o_.metrics, ": cannot be written");
    }
    if (o_.nodes == 1) return;
    dist::ControlServerOptions serve;
    const auto [host, port] = split(o_.rendezvous);
    serve.bind = host == "localhost" || host.starts_with("127.") ? "127.0.0.1" : "*";
    serve.port = port;
    serve.world_size = o_.nodes;
    serve.keys = o_.keys;
    serve.run_id = dist::derived_run_id(o_.keys.run_id, "launchers");
    serve.silence = o_.silence;
    serve.losses_fail_waits = false;
    launchers_ = std::make_unique<dist::ControlServer>(std::move(serve));
  }

  ~FirstNode() override {
    if (!launchers_) return;
    // However this launcher ends, the others must not wait.
    launchers_->set("end", std::to_string(over_ ? code_ : 1));
    const auto deadline = Clock::now() + std::chrono::duration<double>(kEndSeconds);
    while (joined_nodes().size() > 1 && Clock::now() < deadline) std::this_thread::sleep_for(kPoll);
  }

  std::optional<LaunchPlan> next() override {
    if (over_) return std::nullopt;
    const std::map<int, int> ranks_of = gather();
    if (over_) return std::nullopt;
    LaunchPlan plan;
    plan.attempt = attempt_;
    Json first = Json::object(), ranks = Json::object();
    plan_nodes_.clear();
    first_rank_.clear();
    plan.world_size = 0;
    // A machine that went away and comes back has all its places again.
    std::erase_if(given_up_, [&](const auto& each) { return !ranks_of.contains(each.first); });
    places_ = 0;
    for (auto [node, count] : ranks_of) {
      if (const auto given_up = given_up_.find(node); given_up != given_up_.end()) count -= given_up->second;
      places_ += count;
      if (o_.elastic) count = std::min(count, o_.elastic->second - plan.world_size);
      first[std::to_string(node)] = first_rank_[node] = plan.world_size;
      ranks[std::to_string(node)] = count;
      plan.world_size += count;
      plan_nodes_.insert(node);
    }
    plan.ranks = ranks["0"].get<int>();
    if (o_.elastic && plan.world_size < o_.elastic->first) {
      output_.note(
          concat("only ", plan.world_size, " ranks can be started, elastic asks for at least ", o_.elastic->first));
      finish(code_ != 0 ? code_ : 1);
      return std::nullopt;
    }
    plan.run_id = dist::derived_run_id(o_.keys.run_id, concat("start ", attempt_));
    serve_ranks(plan);
    const std::string host = o_.nodes == 1 ? "127.0.0.1" : split(o_.rendezvous).first;
    plan.rendezvous = concat(host, ':', ranks_->port());
    if (launchers_) {
      launchers_->set(key("plan", attempt_), Json{{"world_size", plan.world_size},
                                                  {"run_id", plan.run_id},
                                                  {"rendezvous", plan.rendezvous},
                                                  {"first_rank", first},
                                                  {"ranks", ranks}}
                                                 .dump());
    }
    world_size_ = plan.world_size;
    seen_.clear();
    failed_ = false;
    dead_ = -1;
    return plan;
  }

  void ended(const RankEnd& end) override { note_end(end, "this machine"); }

  void asked(int signal) override {
    asked_ = signal;
    if (launchers_) launchers_->set(key("ask", attempt_), std::to_string(signal));
  }

  int forwarded() override { return 0; }

  bool failing() override {
    if (launchers_) {
      for (int rank = 0; rank < world_size_; ++rank) {
        if (seen_.contains(rank)) continue;
        if (const auto text = launchers_->find(key("ended", attempt_, rank))) {
          const Json end = parsed(*text);
          note_end({rank, end.value("pid", 0), end.value("code", 1), end.value("seconds", 0.0)},
                   "node " + std::to_string(end.value("node", -1)));
        }
      }
      const std::set<int> here = joined_nodes();
      for (const int node : plan_nodes_) {
        if (!here.contains(node))
          set_failure(1, concat("the launcher of node ", node, " is gone, and its ranks with it"));
      }
    }
    note_silence();
    return failed_;
  }

  void done() override {
    if (launchers_) {
      std::set<int> waiting = plan_nodes_;
      waiting.erase(0);
      while (!waiting.empty()) {
        failing();
        const std::set<int> here = joined_nodes();
        std::erase_if(waiting,
                      [&](int node) { return !here.contains(node) || launchers_->find(key("done", attempt_, node)); });
        while (const int signal = signals_.take()) asked(signal);
        std::this_thread::sleep_for(kPoll);
      }
      failing();
    }
    ranks_.reset();
    if (!failed_) return finish(0);
    if (asked_ != 0 || attempt_ >= o_.restarts) return finish(code_);
    ++attempt_;
    output_.note(concat("restart ", attempt_, " of ", o_.restarts));
    if (o_.elastic && dead_ >= 0) give_up_place();
  }

  int code() const override { return code_; }

 private:
  void finish(int code) {
    over_ = true;
    code_ = code;
  }

  /// An elastic run goes on without the place of a rank that was killed or fell silent.
  void give_up_place() {
    if (places_ - 1 < o_.elastic->first) {
      output_.note(concat("elastic asks for at least ", o_.elastic->first, " ranks: the place of rank ", dead_,
                          " is used again"));
      return;
    }
    int node = 0;
    for (const auto& [each, first] : first_rank_) {
      if (first <= dead_) node = each;
    }
    ++given_up_[node];
    output_.note(
        concat("elastic: the place of rank ", dead_, " on node ", node, " is given up, ", places_ - 1, " are left"));
  }

  std::set<int> joined_nodes() const {
    std::set<int> nodes = {0};
    for (const dist::Member& member : launchers_->members()) {
      if (member.state == dist::MemberState::joined) nodes.insert(member.rank);
    }
    return nodes;
  }

  /// How many ranks each machine that is there can run; over if they are too few.
  std::map<int, int> gather() {
    std::map<int, int> ranks_of = {{0, o_.ranks}};
    if (!launchers_) return ranks_of;
    const auto deadline = Clock::now() + std::chrono::duration<double>(attempt_ == 0 ? o_.join_timeout : 0);
    for (;;) {
      for (const int node : joined_nodes()) {
        if (const auto text = launchers_->find(concat("ranks/", node))) ranks_of[node] = std::atoi(text->c_str());
      }
      std::erase_if(ranks_of, [&](const auto& each) { return !joined_nodes().contains(each.first); });
      if (static_cast<int>(ranks_of.size()) == o_.nodes) return ranks_of;
      if (const int signal = signals_.take()) {
        finish(128 + signal);
        return {};
      }
      if (Clock::now() >= deadline) break;
      std::this_thread::sleep_for(kPoll);
    }
    std::string missing;
    for (int node = 0; node < o_.nodes; ++node) {
      if (!ranks_of.contains(node)) missing += concat(missing.empty() ? "" : ", ", node);
    }
    output_.note(concat("the launchers of nodes ", missing, " are not there",
                        o_.elastic ? ": going on without them"
                                   : ". Hint: --elastic MIN:MAX goes on without them; are all launchers started with "
                                     "the same --rendezvous and --keys?"));
    if (!o_.elastic) finish(code_ != 0 ? code_ : 1);
    return ranks_of;
  }

  void serve_ranks(const LaunchPlan& plan) {
    dist::ControlServerOptions serve;
    serve.bind = o_.nodes == 1 ? "127.0.0.1" : "*";
    serve.world_size = plan.world_size;
    serve.keys = o_.keys;
    serve.run_id = plan.run_id;
    serve.silence = o_.silence;
    serve.on_log = [this](const dist::LogRecord& record) {
      if (log::enabled(record.level))
        output_.line(record.rank, concat(log::to_string(record.level), "  ", record.text));
    };
    serve.on_metric = [this](const dist::MetricRecord& record) {
      if (o_.metrics.empty()) return;
      metrics_ << "{\"rank\":" << record.rank << ",\"microseconds\":" << record.microseconds
               << ",\"record\":" << record.json << "}" << std::endl;
      if (!metrics_ && !metrics_failed_.exchange(true))
        output_.note(concat(o_.metrics, ": metrics are lost: cannot be written"));
    };
    ranks_ = std::make_unique<dist::ControlServer>(std::move(serve));
  }

  void note_end(const RankEnd& end, const std::string& where) {
    if (!seen_.insert(end.rank).second) return;
    note_silence();  // whoever waited for a rank that was lost fails too, but after it
    ranks_->ended(end.rank, end.code == 0, end.how());
    if (end.code == 0) return;
    char seconds[32];
    std::snprintf(seconds, sizeof seconds, "%.1f", end.seconds);
    if (!failed_ && end.signalled()) dead_ = end.rank;
    set_failure(end.code,
                concat("rank ", end.rank, " of ", world_size_, " (pid ", end.pid, ", ", where,
                       ") failed first: ", end.how(), ", after ", seconds, " s"),
                end.rank);
  }

  void note_silence() {
    if (failed_) return;
    for (const dist::Member& member : ranks_->members()) {
      if (member.state != dist::MemberState::lost || failed_) continue;
      dead_ = member.rank;
      set_failure(1, member.describe(), member.rank);
    }
  }

  void set_failure(int code, const std::string& text, int rank = -1) {
    if (failed_) return;
    failed_ = true;
    code_ = code;
    const std::vector<std::string> last = output_.last_lines(rank);
    output_.note(last.empty() ? text : text + "; its last lines:");
    for (const std::string& line : last) output_.note("  " + line);
    if (launchers_) launchers_->set(key("stop", attempt_), text);
  }

  const LaunchNodesOptions o_;
  LaunchOutput& output_;
  LaunchSignals& signals_;
  std::ofstream metrics_;
  std::atomic<bool> metrics_failed_ = false;
  std::unique_ptr<dist::ControlServer> launchers_, ranks_;
  std::set<int> plan_nodes_, seen_;
  std::map<int, int> first_rank_;  ///< of each node in this start
  std::map<int, int> given_up_;    ///< places of a node that are no longer used
  int places_ = 0;                 ///< for ranks, in this start
  int dead_ = -1;                  ///< the rank that this start failed with, if it was killed or fell silent
  int attempt_ = 0, world_size_ = 0, asked_ = 0, code_ = 0;
  bool failed_ = false, over_ = false;
};

class OtherNode final : public LaunchNodes {
 public:
  OtherNode(const LaunchNodesOptions& options, LaunchOutput& output, LaunchSignals& signals)
      : o_(options), output_(output), signals_(signals) {
    dist::ControlClientOptions join;
    join.address = o_.rendezvous;
    join.rank = o_.node_rank;
    join.world_size = o_.nodes;
    join.keys = o_.keys.for_client();
    join.run_id = dist::derived_run_id(o_.keys.run_id, "launchers");
    join.connect_timeout = o_.join_timeout;
    client_ = std::make_unique<dist::ControlClient>(std::move(join));
    client_->set(concat("ranks/", o_.node_rank), std::to_string(o_.ranks));
  }

  std::optional<LaunchPlan> next() override {
    for (;;) {
      if (const auto end = client_->find("end")) {
        code_ = std::atoi(end->c_str());
        return std::nullopt;
      }
      if (const auto text = client_->find(key("plan", attempt_ + 1))) {
        ++attempt_;
        const Json json = parsed(*text);
        const std::string node = std::to_string(o_.node_rank);
        LaunchPlan plan;
        plan.attempt = attempt_;
        plan.world_size = json.at("world_size").get<int>();
        plan.run_id = json.at("run_id").get<std::string>();
        plan.rendezvous = json.at("rendezvous").get<std::string>();
        if (!json.at("ranks").contains(node)) continue;  // made before this launcher came
        plan.first_rank = json.at("first_rank").at(node).get<int>();
        plan.ranks = json.at("ranks").at(node).get<int>();
        return plan;
      }
      if (const int signal = signals_.take()) {
        code_ = 128 + signal;
        return std::nullopt;
      }
      std::this_thread::sleep_for(5 * kPoll);
    }
  }

  void ended(const RankEnd& end) override {
    client_->set(key("ended", attempt_, end.rank),
                 Json{{"pid", end.pid}, {"code", end.code}, {"seconds", end.seconds}, {"node", o_.node_rank}}.dump());
    if (end.code != 0) output_.note(concat("rank ", end.rank, " (pid ", end.pid, ") ended: ", end.how()));
  }

  void asked(int) override {}

  int forwarded() override {
    if (attempt_ == forwarded_in_) return 0;
    const auto signal = client_->find(key("ask", attempt_));
    if (!signal) return 0;
    forwarded_in_ = attempt_;
    return std::atoi(signal->c_str());
  }

  bool failing() override { return client_->find(key("stop", attempt_)).has_value(); }
  void done() override { client_->set(key("done", attempt_, o_.node_rank), "1"); }
  int code() const override { return code_; }

 private:
  const LaunchNodesOptions o_;
  LaunchOutput& output_;
  LaunchSignals& signals_;
  std::unique_ptr<dist::ControlClient> client_;
  int attempt_ = -1, forwarded_in_ = -1, code_ = 1;
};

}  // namespace

std::unique_ptr<LaunchNodes> LaunchNodes::make(const LaunchNodesOptions& options, LaunchOutput& output,
                                               LaunchSignals& signals) {
  if (options.node_rank == 0) return std::make_unique<FirstNode>(options, output, signals);
  return std::make_unique<OtherNode>(options, output, signals);
}

}  // namespace weft::apps
