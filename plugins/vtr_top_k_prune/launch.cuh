// What the shell calls.
#pragma once

#include <cuda_runtime_api.h>

#include "launch.h"

// Fills in what follows from the rest of ``p`` and queues the launches.
cudaError_t vtr_queue(VtrTopKPruneParams p, VtrKernel score, cudaStream_t stream);
