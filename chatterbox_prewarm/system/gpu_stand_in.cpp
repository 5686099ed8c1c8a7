// A stand-in for a GPU: the functions of CUDA's libraries that torch and Triton call while they compile, without a
// device. It lets a machine without a GPU compile for one. A GPU is described by the macros TARGET_*.
//
// Functions that are missing here are those of the real libraries, which fail without a driver. Nothing is computed:
// memory on the device has addresses and no content, and a launch does nothing. A copy from the device fails, because its content would become a constant of the compiled code;
// with CHATTERBOX_PREWARM_STAND_IN_READS=zeros it gives zeros, for a start that loads what was compiled.
//
// With CHATTERBOX_PREWARM_STAND_IN_LOG=FILE, one line is written for each loaded kernel, launch and matrix product.
//
// One library takes the place of libcuda.so.1 (the driver) and libnvidia-ml.so.1 (NVML). It is preloaded, so that its
// functions also come before those of the CUDA runtime, cuBLAS and cuFFT.
//
// Sources: the headers of CUDA 12.4 and 13.0, and NVML's API reference.

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr uint64_t kMemory = 1ull << 42;  // addresses, not bytes
constexpr size_t kAlignment = 512;        // of the real allocator

// Addresses that no process can read or write, so that a forgotten copy ends the process instead of going unnoticed.
char* reservation() {
    static char* const base = [] {
        void* memory = mmap(nullptr, kMemory, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
    }();
    return base;
}

bool on_device(const void* address) {
    const char* base = reservation();
    return base != nullptr && address >= base && address < base + kMemory;
}

cudaError_t allocate(void** address, size_t size) {
    static std::atomic<uint64_t> used{0};
    const uint64_t start = used.fetch_add((size + kAlignment) / kAlignment * kAlignment);
    if (reservation() == nullptr || start + size > kMemory) return cudaErrorMemoryAllocation;
    *address = reservation() + start;
    return cudaSuccess;
}

cudaError_t copy(void* to, const void* from, size_t size) {
    static const char* const reads = getenv("CHATTERBOX_PREWARM_STAND_IN_READS");
    if (on_device(to)) return cudaSuccess;
    if (!on_device(from)) {
        memcpy(to, from, size);
        return cudaSuccess;
    }
    if (reads == nullptr || strcmp(reads, "zeros") != 0) return cudaErrorNotSupported;
    memset(to, 0, size);
    return cudaSuccess;
}

void record(const char* format, ...) {
    static FILE* const log = [] {
        const char* path = getenv("CHATTERBOX_PREWARM_STAND_IN_LOG");
        return path == nullptr ? nullptr : fopen(path, "ae");
    }();
    if (log == nullptr) return;
    va_list arguments;
    va_start(arguments, format);
    vfprintf(log, format, arguments);
    va_end(arguments);
    fputc('\n', log);
    fflush(log);
}

// Different objects need different handles, and nobody looks inside.
template <typename Handle>
void give(Handle* handle) {
    static std::atomic<uintptr_t> last{1};
    *handle = reinterpret_cast<Handle>(last.fetch_add(8) + 7);
}

// The driver numbers these as the runtime does.
int property(int attribute) {
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: return 1024;
        case cudaDevAttrMaxGridDimX: return INT32_MAX;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return TARGET_SHARED_MEMORY;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return TARGET_SHARED_MEMORY + (1 << 10);
        case cudaDevAttrMultiProcessorCount: return TARGET_MULTIPROCESSORS;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return TARGET_THREADS;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor: return TARGET_REGISTERS;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrComputeCapabilityMajor: return TARGET_MAJOR;
        case cudaDevAttrComputeCapabilityMinor: return TARGET_MINOR;
        case cudaDevAttrL2CacheSize: return TARGET_L2_CACHE;
        default: record("unknown property %d", attribute); return 0;
    }
}

bool capturing;
thread_local dim3 launch_grid, launch_block;
thread_local size_t launch_shared;
thread_local void* launch_stream;

}  // namespace

extern "C" {

// ---- CUDA runtime: device ----

cudaError_t cudaGetDeviceCount(int* count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = property(attribute);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
    if (lowest != nullptr) *lowest = 0;
    if (highest != nullptr) *highest = -5;
    return cudaSuccess;
}

#if CUDART_VERSION >= 13000
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int)
#else
cudaError_t cudaGetDeviceProperties_v2(cudaDeviceProp* properties, int)
#endif
{
    memset(properties, 0, sizeof *properties);
    strncpy(properties->name, TARGET_NAME, sizeof properties->name - 1);
    properties->major = TARGET_MAJOR;
    properties->minor = TARGET_MINOR;
    properties->multiProcessorCount = TARGET_MULTIPROCESSORS;
    properties->totalGlobalMem = TARGET_MEMORY;
    properties->l2CacheSize = TARGET_L2_CACHE;
    properties->sharedMemPerBlock = 48 << 10;
    properties->sharedMemPerBlockOptin = TARGET_SHARED_MEMORY;
    properties->sharedMemPerMultiprocessor = TARGET_SHARED_MEMORY + (1 << 10);
    properties->regsPerBlock = properties->regsPerMultiprocessor = TARGET_REGISTERS;
    properties->maxThreadsPerMultiProcessor = TARGET_THREADS;
    properties->maxThreadsPerBlock = properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = INT32_MAX;
    properties->maxGridSize[1] = properties->maxGridSize[2] = UINT16_MAX;
    properties->warpSize = 32;
    return cudaSuccess;
}

// ---- CUDA runtime: memory ----

cudaError_t cudaMalloc(void** address, size_t size) { return allocate(address, size); }
cudaError_t cudaFree(void*) { return cudaSuccess; }
cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
    *address = malloc(size);
    return *address == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFreeHost(void* address) { free(address); return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
    *free_bytes = *total = TARGET_MEMORY;
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) { return copy(to, from, size); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
    return copy(to, from, size);
}
cudaError_t cudaMemset(void*, int, size_t) { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = on_device(address) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    return cudaSuccess;
}

// ---- CUDA runtime: streams and events ----

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { give(stream); return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* number,
                                     cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*)
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                        unsigned long long* number, cudaGraph_t*, const cudaGraphNode_t**, size_t*)
#endif
{
    if (number != nullptr) *number = 1;
    return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { capturing = true; return cudaSuccess; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    capturing = false;
    give(graph);
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t, unsigned long long) {
    give(executable);
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t, unsigned long long) {
    give(executable);
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { record("graph"); return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) { give(event); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { give(event); return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

// ---- CUDA runtime: kernels that are part of torch ----

void** __cudaRegisterFatBinary(void*) { static void* handle[1]; return handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    launch_grid = grid;
    launch_block = block;
    launch_shared = shared;
    launch_stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = launch_grid;
    *block = launch_block;
    *shared = launch_shared;
    *static_cast<void**>(stream) = launch_stream;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3, void**, size_t, cudaStream_t) {
    record("torch %u %u %u", grid.x, grid.y, grid.z);
    return cudaSuccess;
}
// CUDA 13's compiler calls these two instead.
cudaError_t __cudaGetKernel(void** kernel, const void* function) {
    *kernel = const_cast<void*>(function);
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(void*, dim3 grid, dim3, void**, size_t, cudaStream_t) {
    record("torch %u %u %u", grid.x, grid.y, grid.z);
    return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
    record("torch %u %u %u", config->gridDim.x, config->gridDim.y, config->gridDim.z);
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = 10 * TARGET_MAJOR + TARGET_MINOR;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
    *blocks = 2;
    return cudaSuccess;
}

// ---- Driver: Triton's launchers and AOTInductor's packages ----

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { *version = CUDART_VERSION; return 0; }
int cuDeviceGet(int* device, int) { *device = 0; return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) { *value = property(attribute); return 0; }
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { *flags = 0; *active = 1; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { *context = reservation(); return 0; }
int cuCtxGetCurrent(void** context) { *context = reservation(); return 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuCtxGetLimit(size_t* value, int) { *value = 1 << 20; return 0; }
int cuCtxSetLimit(int, size_t) { return 0; }
int cuGetErrorString(int, const char** text) { *text = "an error of the stand-in for a GPU"; return 0; }
int cuPointerGetAttribute(uint64_t* value, int, uint64_t address) { *value = address; return 0; }
int cuModuleLoad(void** module, const char* path) { give(module); record("load %s", path); return 0; }
int cuModuleLoadData(void** module, const void*) { give(module); return 0; }
int cuModuleLoadDataEx(void** module, const void*, unsigned, int*, void**) { give(module); return 0; }
int cuModuleUnload(void*) { return 0; }
// A function's handle is its name, for the log.
int cuModuleGetFunction(void** function, void*, const char* name) { *function = strdup(name); return 0; }
int cuFuncGetAttribute(int* value, int attribute, void*) {
    constexpr int kMaxThreads = 0, kRegisters = 4;
    *value = attribute == kMaxThreads ? 1024 : attribute == kRegisters ? 32 : 0;
    return 0;
}
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuFuncSetCacheConfig(void*, int) { return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) { *blocks = 2; return 0; }
int cuOccupancyMaxActiveClusters(int* clusters, void*, const void*) { *clusters = 1; return 0; }
int cuTensorMapEncodeTiled(...) { return 0; }
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, ...) {
    record("launch %s %u %u %u", static_cast<const char*>(function), x, y, z);
    return 0;
}
int cuLaunchKernelEx(const unsigned* grid, void* function, void**, void**) {
    record("launch %s %u %u %u", static_cast<const char*>(function), grid[0], grid[1], grid[2]);
    return 0;
}
int cuLaunchCooperativeKernel(...) { return 0; }
int cuLinkCreate_v2(...) { return 0; }
int cuLinkAddData_v2(...) { return 0; }
int cuLinkComplete(...) { return 0; }
int cuMemsetD32Async(...) { return 0; }

// ---- cuBLAS and cuFFT: only what a start calls ----

int cublasCreate_v2(void** handle) { give(handle); return 0; }
int cublasDestroy_v2(void*) { return 0; }
int cublasSetStream_v2(void*, void*) { return 0; }
int cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }
int cublasSetMathMode(void*, int) { return 0; }
int cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
int cublasSetPointerMode_v2(void*, int) { return 0; }
int cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
int cublasSgemm_v2(void*, int, int, int m, int n, int k, ...) { record("gemm %d %d %d", m, n, k); return 0; }
int cublasSgemv_v2(void*, int, int m, int n, ...) { record("gemm %d 1 %d", m, n); return 0; }
int cublasGemmEx(void*, int, int, int m, int n, int k, ...) { record("gemm %d %d %d", m, n, k); return 0; }
int cublasSgemmStridedBatched(void*, int, int, int m, int n, int k, ...) { record("gemm %d %d %d", m, n, k); return 0; }
int cublasGemmStridedBatchedEx(void*, int, int, int m, int n, int k, ...) { record("gemm %d %d %d", m, n, k); return 0; }
int cublasLtMatmulDescCreate(void** object, ...) { give(object); return 0; }
int cublasLtMatmulDescDestroy(void*) { return 0; }
int cublasLtMatmulDescSetAttribute(...) { return 0; }
int cublasLtMatrixLayoutCreate(void** object, ...) { give(object); return 0; }
int cublasLtMatrixLayoutDestroy(void*) { return 0; }
int cublasLtMatrixLayoutSetAttribute(...) { return 0; }
int cublasLtMatmulPreferenceCreate(void** object) { give(object); return 0; }
int cublasLtMatmulPreferenceDestroy(void*) { return 0; }
int cublasLtMatmulPreferenceSetAttribute(...) { return 0; }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* found) {
    *found = 1;
    return 0;
}
int cublasLtMatmul(...) { record("gemm with bias"); return 0; }
int cufftCreate(int* plan) { *plan = 1; return 0; }
int cufftDestroy(int) { return 0; }
int cufftSetAutoAllocation(int, int) { return 0; }
int cufftXtMakePlanMany(int, int, long long*, long long*, long long, long long, int, long long*, long long, long long,
                        int, long long, size_t* work_size, int) {
    *work_size = 0;
    return 0;
}
int cufftSetStream(int, void*) { return 0; }
int cufftSetWorkArea(int, void*) { return 0; }
int cufftXtExec(int, void*, void*, int) { record("fft"); return 0; }

// ---- NVML: what identifies the GPU ----

int nvmlInit_v2() { return 0; }
int nvmlInitWithFlags(unsigned) { return 0; }
int nvmlShutdown() { return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned, void** device) { give(device); return 0; }
int nvmlDeviceGetName(void*, char* name, unsigned length) { strncpy(name, TARGET_NAME, length); return 0; }
int nvmlDeviceGetCudaComputeCapability(void*, int* major, int* minor) {
    *major = TARGET_MAJOR;
    *minor = TARGET_MINOR;
    return 0;
}
int nvmlSystemGetDriverVersion(char* version, unsigned length) { strncpy(version, "absent", length); return 0; }
}
