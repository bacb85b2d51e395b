#pragma once
// NVTX's ranges as far as Weft uses them, with what a profiler would see: emulation.h has the list.

int nvtxRangePushA(const char* message);
int nvtxRangePop();
