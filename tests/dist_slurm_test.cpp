// A real Slurm of one node, started for the test: what srun sets is what is recognised. Needs root, slurmctld, slurmd,
// srun and munged; skipped where they are not.
#include <gtest/gtest.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "dist/control/keys.h"

namespace {

namespace fs = std::filesystem;

std::string program(const std::string& name) {
  for (const char* directory : {"/usr/sbin/", "/usr/bin/", "/usr/local/sbin/", "/usr/local/bin/"}) {
    if (access((directory + name).c_str(), X_OK) == 0) return directory + name;
  }
  return "";
}

struct Result {
  int code = -1;
  std::string output;
};

Result shell(const std::string& command) {
  Result result;
  FILE* const pipe = popen(("{ " + command + "; } 2>&1").c_str(), "r");
  if (pipe == nullptr) return result;
  char bytes[4096];
  for (size_t got; (got = fread(bytes, 1, sizeof bytes, pipe)) > 0;) result.output.append(bytes, got);
  result.code = WEXITSTATUS(pclose(pipe));
  return result;
}

class Slurm : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const char* name : {"munged", "slurmctld", "slurmd", "srun"}) {
      if (program(name).empty()) GTEST_SKIP() << "Slurm is not installed: there is no " << name;
    }
    if (geteuid() != 0) GTEST_SKIP() << "starting a Slurm takes root";
    std::string name = "/tmp/weft-slurm-XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    place_ = name;
    for (const char* below : {"state", "spool"}) fs::create_directory(place_ / below);
    std::ofstream key(place_ / "munge.key", std::ios::binary);
    std::random_device random;
    for (int i = 0; i < 64; ++i) key << random();
    key.close();
    fs::permissions(place_ / "munge.key", fs::perms::owner_read | fs::perms::owner_write);
    char host[256] = {};
    gethostname(host, sizeof host - 1);
    const int port = 11000 + getpid() % 1900 * 2;
    const std::string p = place_.string();
    std::ofstream(place_ / "slurm.conf") << "ClusterName=one\nSlurmctldHost=" << host << "(127.0.0.1)\nSlurmUser=root\n"
                                         << "SlurmdUser=root\nAuthType=auth/munge\nAuthInfo=socket=" << p
                                         << "/munge.socket\nStateSaveLocation=" << p << "/state\nSlurmdSpoolDir=" << p
                                         << "/spool\nSlurmctldPidFile=" << p << "/ctld.pid\nSlurmdPidFile=" << p
                                         << "/d.pid\nSlurmctldPort=" << port << "\nSlurmdPort=" << port + 1
                                         << "\nSlurmdParameters=config_overrides\nProctrackType=proctrack/pgid\n"
                                            "TaskPlugin=task/none\nSelectType=select/cons_tres\n"
                                            "SelectTypeParameters=CR_CPU\nReturnToService=2\nMpiDefault=none\n"
                                            "SwitchType=switch/none\nJobAcctGatherType=jobacct_gather/none\nNodeName="
                                         << host << " NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN\n"
                                         << "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n";
    setenv("SLURM_CONF", (p + "/slurm.conf").c_str(), 1);
    start({program("munged"), "--foreground", "--force", "--key-file=" + p + "/munge.key",
           "--socket=" + p + "/munge.socket", "--pid-file=" + p + "/munge.pid", "--log-file=" + p + "/munge.log",
           "--seed-file=" + p + "/munge.seed"});
    for (int i = 0; i < 500 && !fs::exists(place_ / "munge.socket"); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    start({program("slurmctld"), "-D"});
    start({program("slurmd"), "-D"});
    for (int i = 0; i < 120; ++i) {
      if (shell("timeout 5 sinfo -h -o %T").output.find("idle") != std::string::npos) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(250));
    }
    FAIL() << "the node did not come: " << shell("timeout 5 sinfo").output << shell("tail " + p + "/*.log").output;
  }

  void TearDown() override {
    for (auto at = daemons_.rbegin(); at != daemons_.rend(); ++at) kill(*at, SIGTERM);
    for (const pid_t daemon : daemons_) waitpid(daemon, nullptr, 0);
    std::error_code ignored;
    if (!place_.empty()) fs::remove_all(place_, ignored);
  }

  void start(const std::vector<std::string>& words) {
    std::vector<char*> argv;
    for (const std::string& word : words) argv.push_back(const_cast<char*>(word.c_str()));
    argv.push_back(nullptr);
    const std::string log = (place_ / (fs::path(words[0]).filename().string() + ".log")).string();
    const pid_t child = fork();
    if (child == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (freopen(log.c_str(), "w", stderr) == nullptr || freopen(log.c_str(), "a", stdout) == nullptr) _exit(127);
      execv(argv[0], argv.data());
      _exit(127);
    }
    daemons_.push_back(child);
  }

  fs::path place_;
  std::vector<pid_t> daemons_;
};

TEST_F(Slurm, TasksOfAStepFindEachOtherAndABatchScriptIsAlone) {
  const std::string keys = (place_ / "keys").string();
  weft::dist::ControlKeys::make().write(keys);
  setenv("WEFT_KEYS", keys.c_str(), 1);
  const Result step = shell("timeout 120 srun -n 3 " WEFT_LAUNCH_RANK);
  EXPECT_EQ(step.code, 0) << step.output;
  for (int rank = 0; rank < 3; ++rank) {
    const std::string number = std::to_string(rank);
    const std::string line = "rank " + number + " of 3 (local rank " + number + ", node 0), started by Slurm";
    EXPECT_NE(step.output.find(line), std::string::npos) << step.output;
  }
  const std::string script = (place_ / "script").string(), out = (place_ / "out").string();
  // One that the allocation is larger than must not wait for the rest of it.
  std::ofstream(script) << "#!/bin/sh\nexec " WEFT_BINARY " train --data /nonexistent\n";
  const Result alone = shell("timeout 60 sbatch -W -n 2 -o " + out + " " + script + "; cat " + out);
  EXPECT_NE(alone.output.find("/nonexistent"), std::string::npos) << alone.output;
  EXPECT_EQ(alone.output.find("started by"), std::string::npos) << alone.output;
}

}  // namespace
