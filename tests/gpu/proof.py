#!/usr/bin/env python3
"""Proves the CUDA backend on this machine's GPU: every test program labelled cuda, the promises among their tests one
by one, and compute-sanitizer over every family of kernels. tests/gpu.sh builds, or takes a bundle, and starts this.

    proof.py --logs DIR [--minutes 9.5] -- COMMAND...     COMMAND PROGRAM ARG... starts a program of the build
"""

import argparse
import pathlib
import re
import shutil
import sys

from session import NO_GPU, Row, Session, gtest_results

# The programs with the ctest label cuda; a test compares this list with that label.
PROGRAMS = ("gemm_cuda_test", "op_drivers_cuda_test", "optim_cuda_test", "context_cuda_test", "models_cuda_test",
            "models_graph_cuda_test", "models_memory_cuda_test", "fp8_cuda_test", "dist_nccl_cuda_test",
            "attention_cuda_test")
FP8_CAPABILITY = 89  # products of 8-bit floats begin with Ada and Hopper

# What is promised of a GPU: words, bound, program, beginning of the names of the tests that hold it to that.
PROMISES = (
    ("ops: CUDA against the CPU, 4 dtypes x 3 layouts", "each case's bound", "op_drivers_cuda_test",
     "All/CudaOpCases.ForwardAgreesWithTheCpuInEveryDTypeAndLayout/"),
    ("gradients: CUDA against the CPU, the same bits twice", "each case's bound", "op_drivers_cuda_test",
     "All/CudaOpCases.GradientsAgreeWithTheCpuAndHaveTheSameBitsTwice/"),
    ("golden trajectory, f32", "1e-4", "models_cuda_test", "CudaGpt.TenStepsFollowPyTorchInF32Within1e4"),
    ("golden trajectory, bf16", "logits 0.05, loss 0.03", "models_cuda_test",
     "CudaGpt.TenStepsFollowPyTorchInBf16WithinItsRounding"),
    ("golden trajectory, f16", "logits 0.01, loss 0.005", "models_cuda_test",
     "CudaGpt.TenStepsFollowPyTorchInF16WithinItsRounding"),
    ("golden gradients, f32", "1e-4 relative", "models_cuda_test",
     "CudaGpt.EveryGradientIsThatOfPyTorchWithin1e4Relative"),
    ("logits of GPT-2 124M, bf16 against f32", "0.05", "models_cuda_test",
     "CudaGpt.TheLogitsOfAGpt2InBf16AreThoseOfF32Within005"),
    ("two runs", "equal bits", "models_cuda_test", "CudaGpt.TwoRunsHaveTheSameBitsInF32AndBf16"),
    ("a resumed run", "equal bits", "models_cuda_test", "CudaGpt.AResumedRunHasTheBitsOfTheStraightOne"),
    ("recomputation", "equal bits", "models_cuda_test", "CudaGpt.RecomputationGivesTheSameBits"),
    ("recorded steps against called ones", "equal bits", "models_graph_cuda_test",
     "Steps/EveryRecipe.HasTheBitsOfStepsThatAreNotRecorded/"),
    ("savers of memory, alone and together", "equal bits", "models_memory_cuda_test",
     "CudaMemory.EverySaverAndEveryCombinationGivesTheSameBits"),
    ("AdamW's steps against the CPU", "equal bits", "optim_cuda_test",
     "CudaOptimizer.AdamTakesStepsOfTheSameBitsAsTheCpu"),
    ("fp8 linear against the CPU", "order of sums", "fp8_cuda_test", "CudaFp8.LinearIsTheCpusUpToTheOrderOfSums"),
    ("collectives of NCCL, one GPU", "equal bits", "dist_nccl_cuda_test",
     "OneGpu.EveryCollectiveAnswersWithWhatItWasGiven"),
    ("a step in a group of NCCL, one GPU", "equal bits", "dist_nccl_cuda_test",
     "OneGpu.AStepHasTheGradientsOfAGroupWithoutALibrary"),
    ("attention of cuDNN against the definition", "4 units of the dtype", "attention_cuda_test",
     "CudnnAttention.MatchesTheDefinitionForwardAndBackward"),
    ("attention of cuDNN, two runs", "equal bits", "attention_cuda_test", "CudnnAttention.HasTheSameBitsEveryTime"),
    ("attention of cuDNN, recorded steps", "equal bits", "attention_cuda_test",
     "CudnnAttention.TrainsWithTheSameBitsRecordedOrNotAndNearOurOwn"),
)

# One case or two of each family of kernels: the tools slow a program down some hundred times.
SANITIZED = ":".join(f"*{part}*" for part in ("gelu", "layer_norm", "softmax", "attention", "cross_entropy", "sum",
                                              "embedding", "matmul", "dropout", "where", "linear"))
SANITIZER_SECONDS = 150


def prove_programs(session, capability):
    """Runs the programs; returns the verdicts of their tests by program, None for one that was skipped."""
    verdicts = {}
    for program in PROGRAMS:
        goal = "all pass"
        if program == "fp8_cuda_test" and capability < FP8_CAPABILITY:
            session.skip(program, goal, f"compute capability {capability / 10:.1f}, 8-bit products need 8.9")
            verdicts[program] = None
        elif not session.has_time(program, goal, 5):
            verdicts[program] = None
        else:
            result = session.program(program)
            tests = verdicts[program] = gtest_results(result.text)
            count = {verdict: list(tests.values()).count(verdict) for verdict in ("OK", "FAILED", "SKIPPED")}
            text = (f"{count['OK']} passed, {count['FAILED']} failed, {count['SKIPPED']} skipped, "
                    f"exit {result.status}, {result.seconds:.0f} s")
            if program == "attention_cuda_test" and tests and count["SKIPPED"] == len(tests):
                session.skip(program, goal, "attention of cuDNN is not built in or not there, see weft doctor")
                verdicts[program] = None
                continue
            good = result.status == 0 and count["OK"] > 0 and count["FAILED"] == count["SKIPPED"] == 0
            session.add(Row(program, goal, text, "-", "ok" if good else "FAILED"))
            if not good:
                shown = [line for line in result.text.splitlines() if re.search(r"FAILED|Failure|rror|SKIPPED", line)]
                print("\n".join(shown[:40]))
    return verdicts


def prove_promises(session, verdicts):
    for what, bound, program, name in PROMISES:
        tests = verdicts[program]
        if tests is None:
            session.skip(what, bound, f"{program} was skipped")
            continue
        mine = [verdict for test, verdict in tests.items() if test.startswith(name)]
        passed = mine.count("OK")
        if mine and passed == len(mine):
            session.add(Row(what, bound, f"held by {passed} test{'s' if passed > 1 else ''}", "-", "ok"))
        else:
            session.fail(what, bound, f"{passed} of {len(mine)} tests passed" if mine else f"{program} ran no {name}")


def prove_memory(session):
    """compute-sanitizer over the op cases: wrong addresses, and races in shared memory."""
    for tool, summary in (("memcheck", "ERROR SUMMARY: 0 errors"), ("racecheck", "RACECHECK SUMMARY: 0 hazards")):
        what, goal = f"compute-sanitizer {tool}", summary.split(": ")[1]
        if shutil.which("compute-sanitizer") is None:
            session.skip(what, goal, "there is no compute-sanitizer on this machine")
            continue
        if not session.has_time(what, goal, 60):
            continue
        result = session.command(tool, ["compute-sanitizer", "--tool", tool, "--target-processes", "all",
                                        "--error-exitcode", "9", *session.run, "op_drivers_cuda_test",
                                        f"--gtest_filter={SANITIZED}"], SANITIZER_SECONDS)
        tests = list(gtest_results(result.text).values())
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", result.text)
        text = f"{found[-1] if found else 'no summary'}, {tests.count('OK')} tests, exit {result.status}"
        if result.status == -1:
            session.skip(what, goal, f"not done after {result.seconds:.0f} s and {tests.count('OK')} tests")
        else:
            good = result.status == 0 and summary in result.text and tests and set(tests) == {"OK"}
            session.add(Row(what, goal, text, "-", "ok" if good else "FAILED"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logs", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("run", nargs="+", metavar="COMMAND")
    arguments = parser.parse_args()
    session = Session("proof of the CUDA backend", arguments.run, arguments.logs, arguments.minutes)
    capability = session.device()
    if capability is None:
        return NO_GPU
    prove_promises(session, prove_programs(session, capability))
    prove_memory(session)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
