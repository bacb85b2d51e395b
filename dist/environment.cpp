// Which launcher started this process, from the variables that it sets.
#include <algorithm>
#include <charconv>
#include <initializer_list>

#include "core/error.h"
#include "core/file.h"
#include "dist/control/keys.h"
#include "dist/launch_info.h"

namespace weft::dist {
namespace {

constexpr int kMaxRanks = 1 << 20;

/// The variables of one launcher: knows what was found, what is missing, and how to say so.
class Variables {
 public:
  Variables(const Environment& environment, Launcher launcher) : environment_(environment), launcher_(launcher) {}

  /// An empty variable counts as one that is not set.
  const std::string* find(std::string_view name) const {
    const std::string* value = find_variable(environment_, name);
    return value != nullptr && !value->empty() ? value : nullptr;
  }
  bool has(std::string_view name) const { return find(name) != nullptr; }
  std::string text(std::string_view name) const { return has(name) ? *find(name) : ""; }

  void require(std::initializer_list<std::string_view> names) const {
    std::string found, missing;
    for (const std::string_view each : names) {
      if (const std::string* value = find(each)) {
        found += concat(found.empty() ? "" : ", ", each, '=', weft::quoted(*value));
      } else {
        missing += concat(missing.empty() ? "" : ", ", each);
      }
    }
    if (missing.empty()) return;
    wrong("are incomplete: found ", found.empty() ? "none" : found, "; missing ", missing,
          ". Hint: unset those that were found if this process is to run alone");
  }

  int number(std::string_view name, int min, int max) const {
    const std::string* value = find(name);
    int got = 0;
    const char* const end = value->data() + value->size();
    const auto [at, error] = std::from_chars(value->data(), end, got);
    if (error != std::errc() || at != end || got < min || got > max) {
      wrong("are not right: ", name, '=', weft::quoted(*value), " must be a whole number from ", min, " to ", max);
    }
    return got;
  }
  int number_or(std::string_view name, int min, int max, int otherwise) const {
    return has(name) ? number(name, min, max) : otherwise;
  }

  /// Reads rank and world size, which must fit each other.
  void place(LaunchInfo& info, std::string_view rank, std::string_view world, std::string_view local_rank) const {
    info.launcher = launcher_;
    info.world_size = number(world, 1, kMaxRanks);
    info.rank = number(rank, 0, kMaxRanks);
    if (info.rank >= info.world_size) {
      wrong("contradict each other: ", rank, '=', info.rank, " must be below ", world, '=', info.world_size);
    }
    if (local_rank.empty()) return;
    info.local_rank = number(local_rank, 0, kMaxRanks);
    if (info.local_rank > info.rank) {
      wrong("contradict each other: ", local_rank, '=', info.local_rank, " is above ", rank, '=', info.rank);
    }
  }

  template <class... Parts>
  [[noreturn]] void wrong(const Parts&... parts) const {
    fail(ErrorKind::kUsage, "launch", "the variables of ", name(launcher_), ' ', parts...);
  }

 private:
  const Environment& environment_;
  Launcher launcher_;
};

/// A port outside the range from which systems give out free ones, the same for all who know `job`.
int port_of(const std::string& job) {
  uint32_t hash = 0;
  const std::string digits = hash_bytes(as_bytes(job)).substr(0, 8);
  std::from_chars(digits.data(), digits.data() + digits.size(), hash, 16);
  return 15000 + static_cast<int>(hash % 16000);
}

std::string checked_rendezvous(const Variables& variables, const std::string& text) {
  const size_t colon = text.rfind(':');
  int port = 0;
  const char* const end = text.data() + text.size();
  const auto result = colon == std::string::npos || colon == 0
                          ? std::from_chars_result{end, std::errc::invalid_argument}
                          : std::from_chars(text.data() + colon + 1, end, port);
  if (result.ec != std::errc() || result.ptr != end || port < 1 || port > 65535) {
    variables.wrong("are not right: the rendezvous ", weft::quoted(text),
                    " must be HOST:PORT with a port from 1 to 65535");
  }
  return text;
}

/// WEFT_RENDEZVOUS, else MASTER_ADDR:MASTER_PORT, else "".
std::string stated_rendezvous(const Variables& variables) {
  if (variables.has("WEFT_RENDEZVOUS")) return checked_rendezvous(variables, variables.text("WEFT_RENDEZVOUS"));
  if (!variables.has("MASTER_ADDR") && !variables.has("MASTER_PORT")) return "";
  variables.require({"MASTER_ADDR", "MASTER_PORT"});
  return checked_rendezvous(variables, variables.text("MASTER_ADDR") + ':' + variables.text("MASTER_PORT"));
}

void need_rendezvous(const Variables& variables, LaunchInfo& info) {
  info.rendezvous = stated_rendezvous(variables);
  if (!info.rendezvous.empty() || info.world_size == 1) return;
  variables.wrong(
      "do not tell where rank 0 is: missing WEFT_RENDEZVOUS. Hint: set WEFT_RENDEZVOUS=HOST:PORT (or MASTER_ADDR",
      " and MASTER_PORT) to a name of rank 0's machine and a free port there, the same for every rank");
}

/// Where all ranks are on one machine, a port made from the job's name will do.
void one_host_rendezvous(const Variables& variables, LaunchInfo& info, std::string_view local_size) {
  const int local = variables.number_or(local_size, 1, kMaxRanks, 0);
  info.node_rank = local == info.world_size ? 0 : -1;
  if (info.node_rank == 0 && !info.job.empty() && stated_rendezvous(variables).empty()) {
    info.rendezvous = concat("127.0.0.1:", port_of(info.job));
    return;
  }
  need_rendezvous(variables, info);
}

LaunchInfo own(const Variables& variables) {
  LaunchInfo info;
  variables.require({"WEFT_RANK", "WEFT_WORLD_SIZE", "WEFT_LOCAL_RANK", "WEFT_RENDEZVOUS"});
  variables.place(info, "WEFT_RANK", "WEFT_WORLD_SIZE", "WEFT_LOCAL_RANK");
  info.node_rank = variables.number_or("WEFT_NODE_RANK", 0, info.rank, -1);
  info.rendezvous = stated_rendezvous(variables);
  if (info.launcher == Launcher::weft) {
    variables.require({"WEFT_NODE_RANK", "WEFT_KEYS"});
    info.run_id = variables.text("WEFT_RUN_ID");
    if (!is_run_id(info.run_id)) {
      variables.wrong("are not right: WEFT_RUN_ID=", weft::quoted(info.run_id), " must be 32 hexadecimal digits");
    }
  }
  return info;
}

LaunchInfo torchrun(const Variables& variables) {
  LaunchInfo info;
  variables.require({"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"});
  variables.place(info, "RANK", "WORLD_SIZE", "LOCAL_RANK");
  info.node_rank = variables.number_or("GROUP_RANK", 0, info.rank, -1);
  info.restart = variables.number_or("TORCHELASTIC_RESTART_COUNT", 0, kMaxRanks, 0);
  int port = variables.number("MASTER_PORT", 1, 65535);
  // The port itself belongs to torchrun's own store.
  if (variables.text("TORCHELASTIC_USE_AGENT_STORE") == "True") port += port < 65535 ? 1 : -1;
  info.rendezvous = variables.has("WEFT_RENDEZVOUS") ? stated_rendezvous(variables)
                                                     : concat(variables.text("MASTER_ADDR"), ':', port);
  info.job =
      concat("torchrun ", variables.text("TORCHELASTIC_RUN_ID"), ' ', variables.text("MASTER_PORT"), ' ', info.restart);
  return info;
}

LaunchInfo pytorch_job(const Variables& variables) {
  LaunchInfo info;
  variables.require({"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"});
  variables.place(info, "RANK", "WORLD_SIZE", "");
  info.node_rank = info.rank;
  info.rendezvous = stated_rendezvous(variables);
  return info;
}

LaunchInfo open_mpi(const Variables& variables) {
  LaunchInfo info;
  variables.require({"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"});
  variables.place(info, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK");
  for (const char* id : {"PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"}) {
    if (info.job.empty() && variables.has(id)) info.job = "Open MPI " + variables.text(id);
  }
  one_host_rendezvous(variables, info, "OMPI_COMM_WORLD_LOCAL_SIZE");
  return info;
}

LaunchInfo pmi(const Variables& variables) {
  LaunchInfo info;
  variables.require({"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"});
  variables.place(info, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID");
  one_host_rendezvous(variables, info, "MPI_LOCALNRANKS");
  return info;
}

LaunchInfo slurm(const Variables& variables) {
  LaunchInfo info;
  const char* const size = variables.has("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS";
  const char* const list = variables.has("SLURM_STEP_NODELIST") ? "SLURM_STEP_NODELIST" : "SLURM_JOB_NODELIST";
  variables.require({"SLURM_PROCID", size, "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID", list});
  variables.place(info, "SLURM_PROCID", size, "SLURM_LOCALID");
  for (const auto& [theirs, ours] :
       {std::pair("PMI_RANK", info.rank), std::pair("PMIX_RANK", info.rank), std::pair("PMI_SIZE", info.world_size)}) {
    if (variables.has(theirs) && variables.text(theirs) != std::to_string(ours)) {
      variables.wrong("contradict each other: ", theirs, '=', weft::quoted(variables.text(theirs)),
                      ", but SLURM_PROCID=", info.rank, " and ", size, '=', info.world_size);
    }
  }
  info.node_rank = variables.number_or("SLURM_NODEID", 0, info.rank, -1);
  info.restart = variables.number_or("SLURM_RESTART_COUNT", 0, kMaxRanks, 0);
  info.job = concat("Slurm ", variables.text("SLURM_JOB_ID"), '.', variables.text("SLURM_STEP_ID"), ' ', info.restart);
  info.rendezvous = stated_rendezvous(variables);
  if (info.rendezvous.empty()) {
    info.rendezvous = concat(expand_node_list(variables.text(list)).front(), ':', port_of(info.job));
  }
  return info;
}

LaunchInfo indexed_job(const Variables& variables) {
  LaunchInfo info;
  variables.require({"JOB_COMPLETION_INDEX", "WEFT_WORLD_SIZE"});
  variables.place(info, "JOB_COMPLETION_INDEX", "WEFT_WORLD_SIZE", "");
  info.node_rank = info.rank;
  need_rendezvous(variables, info);
  return info;
}

/// The number after the last '-' of a pod's host name.
std::string ordinal_of(const std::string& host) {
  const size_t dash = host.rfind('-');
  const std::string digits = dash == std::string::npos ? "" : host.substr(dash + 1);
  return digits.find_first_not_of("0123456789") == std::string::npos ? digits : "";
}

LaunchInfo stateful_set(const Environment& environment, const Variables& variables) {
  LaunchInfo info;
  Environment with_ordinal = environment;
  const std::string ordinal = ordinal_of(variables.text("HOSTNAME"));
  with_ordinal.push_back({"ordinal of HOSTNAME", ordinal});
  Variables(with_ordinal, Launcher::stateful_set).place(info, "ordinal of HOSTNAME", "WEFT_WORLD_SIZE", "");
  info.node_rank = info.rank;
  need_rendezvous(variables, info);
  return info;
}

LaunchInfo recognised(const Environment& environment) {
  const Variables any(environment, Launcher::none);
  const auto as = [&](Launcher launcher) { return Variables(environment, launcher); };
  const auto any_of = [&](std::initializer_list<std::string_view> names) {
    return std::any_of(names.begin(), names.end(), [&](std::string_view each) { return any.has(each); });
  };
  const bool kubernetes = any.has("KUBERNETES_SERVICE_HOST");
  const bool step = any.has("SLURM_STEP_ID");
  if (any.has("WEFT_RUN_ID")) return own(as(Launcher::weft));
  if (any_of({"WEFT_RANK", "WEFT_LOCAL_RANK", "WEFT_NODE_RANK"})) return own(as(Launcher::by_hand));
  if (kubernetes && any.has("RANK") && !any.has("LOCAL_RANK")) return pytorch_job(as(Launcher::pytorch_job));
  if (any_of({"RANK", "WORLD_SIZE", "LOCAL_RANK"})) return torchrun(as(Launcher::torchrun));
  if (any_of({"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"})) {
    return open_mpi(as(Launcher::open_mpi));
  }
  // srun speaks PMI as well, but Hydra alone tells the local rank in this way.
  if (any.has("MPI_LOCALRANKID") || (!step && any_of({"PMI_RANK", "PMI_SIZE", "PMIX_RANK"})))
    return pmi(as(Launcher::pmi));
  // A batch script or a shell of salloc has a job, and even a task number, but is no step.
  if (step) return slurm(as(Launcher::slurm));
  if (any.has("JOB_COMPLETION_INDEX")) return indexed_job(as(Launcher::indexed_job));
  if (kubernetes && any.has("WEFT_WORLD_SIZE") && !ordinal_of(any.text("HOSTNAME")).empty()) {
    return stateful_set(environment, as(Launcher::stateful_set));
  }
  if (any_of({"WEFT_WORLD_SIZE", "WEFT_RENDEZVOUS"})) return own(as(Launcher::by_hand));
  return {};
}

}  // namespace

const char* name(Launcher launcher) {
  switch (launcher) {
    case Launcher::none:
      return "no launcher";
    case Launcher::weft:
      return "weft launch";
    case Launcher::by_hand:
      return "a launch by hand";
    case Launcher::torchrun:
      return "torchrun";
    case Launcher::pytorch_job:
      return "a PyTorchJob";
    case Launcher::open_mpi:
      return "Open MPI";
    case Launcher::pmi:
      return "PMI (MPICH, Intel MPI)";
    case Launcher::slurm:
      return "Slurm";
    case Launcher::indexed_job:
      return "a Kubernetes indexed Job";
    case Launcher::stateful_set:
      return "a Kubernetes StatefulSet";
  }
  return "";
}

std::string LaunchInfo::describe() const {
  std::string out = concat("rank ", rank, " of ", world_size, " (local rank ", local_rank);
  if (node_rank >= 0) out += concat(", node ", node_rank);
  out += concat("), started by ", name(launcher));
  if (restart > 0) out += concat(", restart ", restart);
  if (!rendezvous.empty()) out += ", rendezvous " + rendezvous;
  return out;
}

LaunchInfo discover(const Environment& environment) {
  LaunchInfo info = recognised(environment);
  const Variables variables(environment, info.launcher);
  info.keys_file = variables.text("WEFT_KEYS");
  info.restart = variables.number_or("WEFT_RESTART", 0, kMaxRanks, info.restart);
  info.elastic = variables.number_or("WEFT_ELASTIC", 0, 1, 0) == 1;
  return info;
}

}  // namespace weft::dist
