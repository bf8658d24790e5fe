#include "instances.cuh"

FORWARD_INSTANCES(__half, f16)
