// Which launcher started a process, from the variables that launchers are known to set.
#include <gtest/gtest.h>

#include "core/error.h"
#include "dist/launch_info.h"
#include "tests/error_of.h"

namespace {

using namespace weft;
using namespace weft::dist;
using weft::testing::error_of;

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

Environment operator+(Environment a, const Environment& b) {
  for (const Variable& each : b) {
    std::erase_if(a, [&](const Variable& old) { return old.name == each.name; });
    a.push_back(each);
  }
  return a;
}

Environment without(Environment environment, const std::string& name) {
  std::erase_if(environment, [&](const Variable& each) { return each.name == name; });
  return environment;
}

std::string refusal(const Environment& environment) {
  return error_of(ErrorKind::kUsage, [&] { discover(environment); });
}

const Environment kOwn = {{"WEFT_RANK", "3"},
                          {"WEFT_WORLD_SIZE", "4"},
                          {"WEFT_LOCAL_RANK", "1"},
                          {"WEFT_NODE_RANK", "1"},
                          {"WEFT_RENDEZVOUS", "10.0.0.1:4711"},
                          {"WEFT_RUN_ID", "0123456789abcdef0123456789abcdef"},
                          {"WEFT_KEYS", "/tmp/keys"}};
const Environment kTorchrun = {{"RANK", "5"},
                               {"WORLD_SIZE", "8"},
                               {"LOCAL_RANK", "1"},
                               {"GROUP_RANK", "2"},
                               {"MASTER_ADDR", "node-a"},
                               {"MASTER_PORT", "29500"},
                               {"TORCHELASTIC_RUN_ID", "none"},
                               {"TORCHELASTIC_RESTART_COUNT", "1"}};
const Environment kSlurm = {{"SLURM_PROCID", "5"},
                            {"SLURM_NTASKS", "8"},
                            {"SLURM_LOCALID", "1"},
                            {"SLURM_NODEID", "2"},
                            {"SLURM_JOB_ID", "12345"},
                            {"SLURM_STEP_ID", "0"},
                            {"SLURM_JOB_NODELIST", "gpu[07-09,12],login"}};
const Environment kOpenMpi = {{"OMPI_COMM_WORLD_RANK", "1"},
                              {"OMPI_COMM_WORLD_SIZE", "4"},
                              {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                              {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
                              {"OMPI_COMM_WORLD_NODE_RANK", "1"},
                              {"PMIX_NAMESPACE", "3891855361"},
                              {"PMIX_RANK", "1"}};
const Environment kHydra = {{"PMI_RANK", "1"}, {"PMI_SIZE", "4"}, {"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "4"}};
const Environment kPod = {{"KUBERNETES_SERVICE_HOST", "10.96.0.1"}, {"HOSTNAME", "train-2"}};
const Environment kPlace = {{"WEFT_RENDEZVOUS", "train-0.train:4711"}};

TEST(Environment, NobodyLaunchedMeansOneRank) {
  const LaunchInfo info = discover({{"PATH", "/bin"}, {"HOSTNAME", "laptop-3"}});
  EXPECT_EQ(info.launcher, Launcher::none);
  EXPECT_EQ(info.rank, 0);
  EXPECT_EQ(info.world_size, 1);
  EXPECT_FALSE(info.hosts_server());
}

TEST(Environment, OwnVariablesAreReadWhole) {
  const LaunchInfo info = discover(kOwn + Environment{{"WEFT_RESTART", "2"}});
  EXPECT_EQ(info.launcher, Launcher::weft);
  EXPECT_EQ(info.rank, 3);
  EXPECT_EQ(info.world_size, 4);
  EXPECT_EQ(info.local_rank, 1);
  EXPECT_EQ(info.node_rank, 1);
  EXPECT_EQ(info.rendezvous, "10.0.0.1:4711");
  EXPECT_EQ(info.run_id, "0123456789abcdef0123456789abcdef");
  EXPECT_EQ(info.keys_file, "/tmp/keys");
  EXPECT_EQ(info.restart, 2);
  EXPECT_EQ(info.describe(),
            "rank 3 of 4 (local rank 1, node 1), started by weft launch, restart 2, rendezvous 10.0.0.1:4711");
  EXPECT_FALSE(discover(kOwn + Environment{{"WEFT_RANK", "0"}, {"WEFT_LOCAL_RANK", "0"}, {"WEFT_NODE_RANK", "0"}})
                   .hosts_server());
}

TEST(Environment, OwnVariablesWithoutARunIdAreALaunchByHandInWhichRankZeroServes) {
  const Environment by_hand = without(without(kOwn, "WEFT_RUN_ID"), "WEFT_NODE_RANK");
  EXPECT_EQ(discover(by_hand).launcher, Launcher::by_hand);
  EXPECT_EQ(discover(by_hand).node_rank, -1);
  EXPECT_TRUE(discover(by_hand + Environment{{"WEFT_RANK", "0"}, {"WEFT_LOCAL_RANK", "0"}}).hosts_server());
}

TEST(Environment, TorchrunIsRecognised) {
  const LaunchInfo info = discover(kTorchrun);
  EXPECT_EQ(info.launcher, Launcher::torchrun);
  EXPECT_EQ(info.rank, 5);
  EXPECT_EQ(info.world_size, 8);
  EXPECT_EQ(info.local_rank, 1);
  EXPECT_EQ(info.node_rank, 2);
  EXPECT_EQ(info.rendezvous, "node-a:29500");
  EXPECT_EQ(info.restart, 1);
  // Where torchrun's own store listens at that port, ours is the next.
  EXPECT_EQ(discover(kTorchrun + Environment{{"TORCHELASTIC_USE_AGENT_STORE", "True"}}).rendezvous, "node-a:29501");
  // Another start is another run: its ranks must not meet.
  EXPECT_NE(discover(kTorchrun).job, discover(kTorchrun + Environment{{"TORCHELASTIC_RESTART_COUNT", "2"}}).job);
}

TEST(Environment, ATaskOfASlurmStepIsRecognisedAndAgreesWithTheOthersOnTheRendezvous) {
  const LaunchInfo info = discover(kSlurm);
  EXPECT_EQ(info.launcher, Launcher::slurm);
  EXPECT_EQ(info.rank, 5);
  EXPECT_EQ(info.world_size, 8);
  EXPECT_EQ(info.local_rank, 1);
  EXPECT_EQ(info.node_rank, 2);
  EXPECT_EQ(info.rendezvous.substr(0, 6), "gpu07:");
  const int port = std::stoi(info.rendezvous.substr(6));
  EXPECT_GE(port, 15000);
  EXPECT_LT(port, 31000);
  const LaunchInfo other =
      discover(kSlurm + Environment{{"SLURM_PROCID", "0"}, {"SLURM_LOCALID", "0"}, {"SLURM_NODEID", "0"}});
  EXPECT_EQ(other.rendezvous, info.rendezvous);
  EXPECT_TRUE(other.hosts_server());
  EXPECT_NE(discover(kSlurm + Environment{{"SLURM_JOB_ID", "12346"}}).rendezvous, info.rendezvous);
  EXPECT_NE(discover(kSlurm + Environment{{"SLURM_STEP_ID", "1"}}).job, info.job);
  // A step on a part of the job's nodes has its own list, and its own number of tasks.
  const LaunchInfo part =
      discover(kSlurm + Environment{{"SLURM_STEP_NODELIST", "gpu09"}, {"SLURM_STEP_NUM_TASKS", "6"}});
  EXPECT_EQ(part.rendezvous.substr(0, 6), "gpu09:");
  EXPECT_EQ(part.world_size, 6);
}

TEST(Environment, ABatchScriptOfSlurmIsNoTask) {
  EXPECT_EQ(discover(without(kSlurm, "SLURM_STEP_ID")).launcher, Launcher::none);
}

TEST(Environment, ARankThatSrunAndItsPmiNumberDifferentlyIsRefused) {
  EXPECT_EQ(discover(kSlurm + Environment{{"PMI_RANK", "5"}, {"PMI_SIZE", "8"}}).launcher, Launcher::slurm);
  EXPECT_HAS(refusal(kSlurm + Environment{{"PMI_RANK", "4"}, {"PMI_SIZE", "8"}}), "PMI_RANK=\"4\", but SLURM_PROCID=5");
}

TEST(Environment, OpenMpiOnOneHostNeedsNoRendezvousAndOnSeveralSaysWhatToSet) {
  const LaunchInfo info = discover(kOpenMpi);
  EXPECT_EQ(info.launcher, Launcher::open_mpi);
  EXPECT_EQ(info.rank, 1);
  EXPECT_EQ(info.world_size, 4);
  EXPECT_EQ(info.local_rank, 1);
  EXPECT_EQ(info.node_rank, 0);
  EXPECT_EQ(info.rendezvous.substr(0, 10), "127.0.0.1:");
  const Environment several = kOpenMpi + Environment{{"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}};
  EXPECT_HAS(refusal(several), "missing WEFT_RENDEZVOUS");
  EXPECT_EQ(discover(several + Environment{{"WEFT_RENDEZVOUS", "a:1"}}).rendezvous, "a:1");
  const LaunchInfo placed = discover(several + Environment{{"MASTER_ADDR", "b"}, {"MASTER_PORT", "2"}});
  EXPECT_EQ(placed.launcher, Launcher::open_mpi);
  EXPECT_EQ(placed.rendezvous, "b:2");
  EXPECT_EQ(placed.node_rank, -1);
  EXPECT_HAS(refusal(several + Environment{{"MASTER_ADDR", "b"}}), "found MASTER_ADDR=\"b\"; missing MASTER_PORT");
}

TEST(Environment, HydraIsRecognised) {
  const LaunchInfo info = discover(kHydra + kPlace);
  EXPECT_EQ(info.launcher, Launcher::pmi);
  EXPECT_EQ(info.rank, 1);
  EXPECT_EQ(info.world_size, 4);
  EXPECT_EQ(info.local_rank, 1);
  EXPECT_EQ(info.rendezvous, "train-0.train:4711");
  EXPECT_HAS(refusal(kHydra), "missing WEFT_RENDEZVOUS");
  EXPECT_HAS(refusal({{"PMIX_RANK", "1"}}), "missing PMI_RANK, PMI_SIZE, MPI_LOCALRANKID");
}

TEST(Environment, PodsOfKubernetesAreRecognised) {
  const LaunchInfo job = discover(kPod + kPlace + Environment{{"JOB_COMPLETION_INDEX", "2"}, {"WEFT_WORLD_SIZE", "4"}});
  EXPECT_EQ(job.launcher, Launcher::indexed_job);
  EXPECT_EQ(job.rank, 2);
  EXPECT_EQ(job.local_rank, 0);
  EXPECT_EQ(job.node_rank, 2);
  EXPECT_EQ(job.world_size, 4);
  const LaunchInfo set = discover(kPod + kPlace + Environment{{"WEFT_WORLD_SIZE", "4"}});
  EXPECT_EQ(set.launcher, Launcher::stateful_set);
  EXPECT_EQ(set.rank, 2);
  EXPECT_EQ(set.world_size, 4);
  const LaunchInfo pytorch = discover(kPod + without(without(kTorchrun, "LOCAL_RANK"), "GROUP_RANK"));
  EXPECT_EQ(pytorch.launcher, Launcher::pytorch_job);
  EXPECT_EQ(pytorch.rank, 5);
  EXPECT_EQ(pytorch.local_rank, 0);
  EXPECT_EQ(pytorch.rendezvous, "node-a:29500");
  EXPECT_HAS(refusal(kPod + Environment{{"JOB_COMPLETION_INDEX", "2"}}),
             "a Kubernetes indexed Job are incomplete: found JOB_COMPLETION_INDEX=\"2\"; missing WEFT_WORLD_SIZE");
  EXPECT_HAS(refusal(kPod + Environment{{"JOB_COMPLETION_INDEX", "2"}, {"WEFT_WORLD_SIZE", "4"}}),
             "missing WEFT_RENDEZVOUS");
  EXPECT_EQ(discover(kPod).launcher, Launcher::none);
}

TEST(Environment, TheInnermostOfSeveralLaunchersWins) {
  const Environment all = kSlurm + kHydra + kPlace + kOpenMpi + kTorchrun + kOwn;
  EXPECT_EQ(discover(all).launcher, Launcher::weft);
  EXPECT_EQ(discover(kSlurm + kOpenMpi + kTorchrun).launcher, Launcher::torchrun);
  EXPECT_EQ(discover(kSlurm + kOpenMpi).launcher, Launcher::open_mpi);
  EXPECT_EQ(discover(kSlurm + kHydra + kPlace).launcher, Launcher::pmi);
  EXPECT_EQ(discover(kSlurm + kPod + Environment{{"JOB_COMPLETION_INDEX", "2"}}).launcher, Launcher::slurm);
}

TEST(Environment, AHalfSetEnvironmentListsWhatIsThereAndWhatIsMissing) {
  // Every launcher, with each of its variables left out that it cannot do without.
  const std::vector<std::pair<Environment, std::vector<std::string>>> launchers = {
      {kOwn, {"WEFT_RANK", "WEFT_WORLD_SIZE", "WEFT_LOCAL_RANK", "WEFT_NODE_RANK", "WEFT_RENDEZVOUS", "WEFT_KEYS"}},
      {without(kOwn, "WEFT_RUN_ID"), {"WEFT_RANK", "WEFT_WORLD_SIZE", "WEFT_LOCAL_RANK", "WEFT_RENDEZVOUS"}},
      {kTorchrun, {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}},
      {kSlurm, {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_JOB_NODELIST"}},
      {kOpenMpi, {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"}},
      {kHydra + kPlace, {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"}}};
  for (const auto& [environment, names] : launchers) {
    EXPECT_NO_THROW(discover(environment));
    for (const std::string& name : names) {
      const std::string error = refusal(without(environment, name));
      EXPECT_HAS(error, "missing " + name);
      EXPECT_HAS(error, "found ");
      // An empty one is as good as none.
      EXPECT_EQ(refusal(environment + Environment{{name, ""}}), error);
    }
  }
  EXPECT_HAS(refusal({{"WEFT_WORLD_SIZE", "4"}}),
             "found WEFT_WORLD_SIZE=\"4\"; missing WEFT_RANK, WEFT_LOCAL_RANK, WEFT_RENDEZVOUS");
}

TEST(Environment, NumbersThatAreNoneOrDoNotFitEachOtherAreRefused) {
  for (const char* wrong : {"x", "-1", "1.5", " 1", "1 ", "99999999999999999999"}) {
    EXPECT_HAS(refusal(kTorchrun + Environment{{"RANK", wrong}}), "must be a whole number from 0");
  }
  EXPECT_HAS(refusal(kTorchrun + Environment{{"WORLD_SIZE", "0"}}), "must be a whole number from 1");
  EXPECT_HAS(refusal(kTorchrun + Environment{{"WORLD_SIZE", "5"}}),
             "contradict each other: RANK=5 must be below WORLD_SIZE=5");
  EXPECT_HAS(refusal(kTorchrun + Environment{{"LOCAL_RANK", "6"}}), "LOCAL_RANK=6 is above RANK=5");
  EXPECT_HAS(refusal(kTorchrun + Environment{{"MASTER_PORT", "70000"}}), "MASTER_PORT");
  EXPECT_HAS(refusal(kOwn + Environment{{"WEFT_RUN_ID", "x"}}), "WEFT_RUN_ID=\"x\" must be 32 hexadecimal digits");
  EXPECT_HAS(refusal(kOwn + Environment{{"WEFT_RESTART", "often"}}), "WEFT_RESTART");
  for (const char* wrong : {"host", ":1", "host:", "host:0", "host:65536", "host:1x"}) {
    EXPECT_HAS(refusal(kOwn + Environment{{"WEFT_RENDEZVOUS", wrong}}), "must be HOST:PORT");
  }
}

TEST(Environment, NodeListsOfSlurmAreExpanded) {
  using Nodes = std::vector<std::string>;
  EXPECT_EQ(expand_node_list("a"), Nodes{"a"});
  EXPECT_EQ(expand_node_list("a,b-1"), (Nodes{"a", "b-1"}));
  EXPECT_EQ(expand_node_list("gpu[08-11,3]"), (Nodes{"gpu08", "gpu09", "gpu10", "gpu11", "gpu3"}));
  EXPECT_EQ(expand_node_list("r[1-2]n[0-1].x,b"), (Nodes{"r1n0.x", "r1n1.x", "r2n0.x", "r2n1.x", "b"}));
  EXPECT_EQ(expand_node_list("n[0-65535]").size(), 65536u);
  for (const char* wrong : {"", "a,", ",a", "a[1", "a]1[", "a[]", "a[1-]", "a[3-1]", "a[x]", "a[1,,2]", "a[[1]]",
                            "n[0-65536]", "n[0-999]m[0-999]", "a[0-99999999999]", "a[1,]"}) {
    EXPECT_HAS(error_of(ErrorKind::kUsage, [&] { expand_node_list(wrong); }), "the Slurm node list");
  }
}

}  // namespace
