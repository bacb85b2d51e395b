#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/environment.h"

namespace weft::dist {

/// Who started this process as one of several.
enum class Launcher : uint8_t {
  none,
  weft,     ///< weft launch
  by_hand,  ///< our variables without a run id: somebody's script
  torchrun,
  pytorch_job,  ///< Kubernetes: torchrun's names, one rank in each pod
  open_mpi,
  pmi,           ///< MPICH, Intel MPI (Hydra)
  slurm,         ///< srun
  indexed_job,   ///< Kubernetes: a Job with completionMode Indexed, alone or in a JobSet
  stateful_set,  ///< Kubernetes: pods that are numbered by their host names
};

/// "no launcher", "weft launch", "torchrun", ...
const char* name(Launcher launcher);

/// This process's place in a run.
struct LaunchInfo {
  Launcher launcher = Launcher::none;
  int rank = 0, world_size = 1;
  int local_rank = 0;      ///< among the processes of its machine: which device is its own
  int node_rank = 0;       ///< which machine; -1 if the launcher does not say
  std::string rendezvous;  ///< HOST:PORT of the control server; with one rank it may be ""
  std::string job;         ///< what the launcher calls the run; part of the run's id
  std::string run_id;      ///< 32 hexadecimal digits, or "": that of the keys, derived with `job`
  std::string keys_file;   ///< WEFT_KEYS; needed to connect
  int restart = 0;         ///< how often the launcher has started the run again
  bool elastic = false;    ///< whether another start may have another number of ranks

  /// Whether rank 0 serves the control plane itself: every launcher but weft launch, which serves it.
  bool hosts_server() const { return rank == 0 && launcher != Launcher::weft && launcher != Launcher::none; }
  /// "rank 3 of 8 (local rank 1, node 1), started by Slurm, rendezvous node7:21034".
  std::string describe() const;
};

/// Recognises the launcher from the variables it sets; docs/parallelism/launching.md lists them. Several may be there
/// (torchrun inside a Slurm job): the innermost wins, in the order of `Launcher`. MASTER_ADDR with MASTER_PORT, or
/// WEFT_RENDEZVOUS, tell the rendezvous where a launcher does not. A process that nobody launched is rank 0 of 1.
/// @throws Error  kUsage for a launcher's variables that are incomplete or contradict each other; lists what was found
/// and what is missing.
LaunchInfo discover(const Environment& environment);

/// The nodes of a Slurm node list: "gpu[01-03,7],login" -> gpu01 gpu02 gpu03 gpu7 login.
/// @throws Error  kUsage if it is none, or names more than 65,536.
std::vector<std::string> expand_node_list(const std::string& list);

}  // namespace weft::dist
