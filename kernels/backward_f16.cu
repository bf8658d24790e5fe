#include "instances.cuh"

BACKWARD_INSTANCES(__half, f16)
