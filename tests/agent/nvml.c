/* A stand-in for the NVIDIA driver's library, with faults to order.
 *
 * Exports the NVML symbols that the sampler uses, for as many devices as the file named by FAKE_NVML says. The file is
 * read again at every call, so that a test changes the driver's behaviour while the agent runs. One word per line:
 *
 *   devices N          number of devices (default 1)
 *   lost I             device I answers NVML_ERROR_GPU_IS_LOST
 *   hung I             calls for device I do not return for as long as the line is there
 *   hung_init          neither does nvmlInit
 *   not_loaded         nvmlInit answers NVML_ERROR_DRIVER_NOT_LOADED
 *   unsupported NAME   that reading answers NVML_ERROR_NOT_SUPPORTED
 *   failing NAME       that reading answers NVML_ERROR_UNKNOWN
 *   mig I              device I has two slices, with a gap between their numbers
 *   process I P B      process P holds B bytes of device I; B = - is not known
 *   xid I N            device I has had the error N; each line is an event of its own, told once
 *   hung_events        waiting for events does not return
 *   lost_events        waiting for events answers NVML_ERROR_GPU_IS_LOST
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
  SUCCESS = 0,
  NOT_SUPPORTED = 3,
  NOT_FOUND = 6,
  INSUFFICIENT_SIZE = 7,
  DRIVER_NOT_LOADED = 9,
  TIMEOUT = 10,
  IS_LOST = 15,
  VERSION_MISMATCH = 25,
  UNKNOWN = 999
};

struct device {
  int index;
  int slice; /* -1 = the whole device */
};

static struct device handles[16][4];

struct memory_v2 {
  unsigned version;
  unsigned long long total, reserved, free, used;
};

struct utilization {
  unsigned gpu, memory;
};

/* Whether the control file has `word`, alone or with this argument. */
static int ordered(const char* word, const char* argument) {
  char line[128], wanted[128];
  int found = 0;
  FILE* file = fopen(getenv("FAKE_NVML"), "r");
  if (!file) return 0;
  snprintf(wanted, sizeof wanted, argument ? "%s %s" : "%s", word, argument);
  while (fgets(line, sizeof line, file)) {
    line[strcspn(line, "\n")] = 0;
    found |= !strcmp(line, wanted);
  }
  fclose(file);
  return found;
}

static int ordered_for(const char* word, int index) {
  char text[16];
  snprintf(text, sizeof text, "%d", index);
  return ordered(word, text);
}

static int count(void) {
  char line[128];
  int devices = 1;
  FILE* file = fopen(getenv("FAKE_NVML"), "r");
  if (!file) return devices;
  while (fgets(line, sizeof line, file)) sscanf(line, "devices %d", &devices);
  fclose(file);
  return devices;
}

static int answer(struct device* device, const char* reading) {
  while (ordered_for("hung", device->index)) usleep(10000);
  if (ordered_for("lost", device->index)) return IS_LOST;
  if (ordered("unsupported", reading) || (device->slice >= 0 && strcmp(reading, "memory"))) return NOT_SUPPORTED;
  if (ordered("failing", reading)) return UNKNOWN;
  return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) {
  while (ordered("hung_init", NULL)) usleep(10000);
  return ordered("not_loaded", NULL) ? DRIVER_NOT_LOADED : SUCCESS;
}

int nvmlShutdown(void) { return SUCCESS; }

int nvmlSystemGetDriverVersion(char* text, unsigned length) {
  snprintf(text, length, "999.42");
  return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned* devices) {
  *devices = count();
  return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct device** handle) {
  handles[index][0] = (struct device){index, -1};
  *handle = &handles[index][0];
  return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char* uuid, struct device** handle) {
  unsigned index;
  if (sscanf(uuid, "GPU-%u", &index) != 1 || (int)index >= count()) return NOT_FOUND;
  if (ordered_for("lost", index)) return IS_LOST;
  return nvmlDeviceGetHandleByIndex_v2(index, handle);
}

int nvmlDeviceGetUUID(struct device* device, char* text, unsigned length) {
  if (device->slice < 0)
    snprintf(text, length, "GPU-%d", device->index);
  else
    snprintf(text, length, "MIG-%d-%d", device->index, device->slice);
  return SUCCESS;
}

int nvmlDeviceGetName(struct device* device, char* text, unsigned length) {
  snprintf(text, length, "Test %s", device->slice < 0 ? "GPU" : "slice");
  return SUCCESS;
}

int nvmlDeviceGetMigMode(struct device* device, unsigned* current, unsigned* pending) {
  *current = *pending = ordered_for("mig", device->index);
  return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(struct device* device, unsigned* slices) {
  *slices = 3;
  return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(struct device* device, unsigned slice, struct device** handle) {
  if (slice == 1) return NOT_FOUND;
  handles[device->index][slice + 1] = (struct device){device->index, slice};
  *handle = &handles[device->index][slice + 1];
  return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(struct device* device, struct memory_v2* memory) {
  int status = answer(device, "memory");
  if (status) return status;
  if (memory->version != (sizeof *memory | 2 << 24)) return VERSION_MISMATCH;
  /* As some drivers do: used contains reserved, so that the parts do not add up to the total. */
  memory->total = 80000000000ull;
  memory->reserved = 500000000ull;
  memory->used = 20000000000ull + device->index;
  memory->free = 60000000000ull;
  return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(struct device* device, struct utilization* rates) {
  int status = answer(device, "utilization");
  rates->gpu = 37;
  return status;
}

int nvmlDeviceGetPowerUsage(struct device* device, unsigned* milliwatts) {
  int status = answer(device, "power");
  *milliwatts = 312500;
  return status;
}

int nvmlDeviceGetTotalEnergyConsumption(struct device* device, unsigned long long* millijoules) {
  int status = answer(device, "energy");
  *millijoules = 123456789ull;
  return status;
}

int nvmlDeviceGetTemperature(struct device* device, int sensor, unsigned* celsius) {
  int status = answer(device, "temperature");
  *celsius = 61;
  return status;
}

int nvmlDeviceGetTotalEccErrors(struct device* device, int type, int counter, unsigned long long* errors) {
  int status = answer(device, "ecc");
  *errors = type ? 1 : 5;
  return status;
}

int nvmlDeviceGetCurrentClocksEventReasons(struct device* device, unsigned long long* reasons) {
  int status = answer(device, "throttled");
  *reasons = 0x4; /* power cap */
  return status;
}

struct process {
  unsigned pid;
  unsigned long long bytes;
  unsigned gpu_instance, compute_instance;
};

int nvmlDeviceGetComputeRunningProcesses_v3(struct device* device, unsigned* room, struct process* processes) {
  char line[128], bytes[64];
  int status = answer(device, "processes"), index;
  unsigned found = 0, pid;
  FILE* file = status ? NULL : fopen(getenv("FAKE_NVML"), "r");
  if (!file) return status;
  while (fgets(line, sizeof line, file)) {
    if (sscanf(line, "process %d %u %63s", &index, &pid, bytes) != 3 || index != device->index) continue;
    if (found < *room)
      processes[found] = (struct process){pid, *bytes == '-' ? ~0ull : strtoull(bytes, NULL, 10), 0, 0};
    found++;
  }
  fclose(file);
  status = found > *room ? INSUFFICIENT_SIZE : SUCCESS;
  *room = found;
  return status;
}

struct event {
  struct device* device;
  unsigned long long type, data;
  unsigned gpu_instance, compute_instance;
};

static int told; /* events that were waited for so far */

int nvmlDeviceGetSupportedEventTypes(struct device* device, unsigned long long* types) {
  *types = ordered("unsupported", "events") ? 0x1 : 0xf;
  return SUCCESS;
}

int nvmlEventSetCreate(int** set) {
  static int sets;
  *set = &sets;
  return SUCCESS;
}

int nvmlEventSetFree(int* set) { return SUCCESS; }

int nvmlDeviceRegisterEvents(struct device* device, unsigned long long types, int* set) {
  return ordered_for("lost", device->index) ? IS_LOST : SUCCESS;
}

int nvmlEventSetWait_v2(int* set, struct event* event, unsigned milliseconds) {
  char line[128];
  int index, number, seen = 0, status = TIMEOUT;
  while (ordered("hung_events", NULL)) usleep(10000);
  if (ordered("lost_events", NULL)) return IS_LOST;
  FILE* file = fopen(getenv("FAKE_NVML"), "r");
  if (!file) return TIMEOUT;
  while (status && fgets(line, sizeof line, file)) {
    if (sscanf(line, "xid %d %d", &index, &number) != 2 || seen++ < told) continue;
    *event = (struct event){&handles[index][0], 0x8, number, ~0u, ~0u};
    told++;
    status = SUCCESS;
  }
  fclose(file);
  return status;
}
