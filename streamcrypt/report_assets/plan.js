"use strict";
// plan.closed and plan.predict in JavaScript, for one shared cache a host; names as in Python.
const page = PLAN.page;

function messagesByBytes(maxBytes, size, variation) {
  if (maxBytes === Infinity || size <= 0) return Infinity;
  if (variation === 0) return Math.max(1, Math.floor(maxBytes / size));
  const bend = 0.88 / Math.pow(variation, 1.6);
  const beyond = (maxBytes / size - (1 + variation * variation) / 2 - 1) * bend;
  return 1 + (beyond > 30 ? beyond : Math.log1p(Math.exp(beyond))) / bend;
}

function stallOf(wait, service, variation) {
  if (wait <= 0) return 0;
  if (service <= 0) return wait;
  const uniform = wait < service ? wait * wait / (2 * service) : wait - service / 2;
  const exponential = wait - service * -Math.expm1(-wait / service);
  const weight = Math.min(1, variation * variation);
  return (1 - weight) * uniform + weight * exponential;
}

function longest(count, variation) {
  const uniform = count / (count + 1);
  const harmonic = Math.log(count) + 0.5772 + 1 / (2 * count);
  const weight = variation * variation;
  return weight <= 1 ? (1 - weight) * uniform + weight * harmonic : harmonic * (1 + weight) / 2;
}

function keysFor(files, perKey, exact, scattered) {
  if (scattered > 1) {
    const met = 1 - Math.pow(1 - 1 / scattered, files * scattered);
    const rest = Math.max(0, files - met) / perKey;
    return perKey < files ? Math.min(met + rest, Math.max(met, files / perKey + 0.5)) : met;
  }
  if (perKey >= files) return 1;
  const whole = Math.ceil(files / perKey - 1e-9);
  return exact ? whole : Math.min(whole, files / perKey + 0.5);
}

const tokensOf = (load) => load.quota;

function finish(load, calls, perKey, stall, lastKey) {
  const workers = load.workers, n = load.files * load.pieces, s = load.service / load.pieces;
  const square = load.variation * load.variation;
  let work, tail;
  if (load.variation === 0 && stall === 0) {
    work = Math.ceil(n / workers) * s; tail = 0;
  } else if (n <= workers) {
    const least = n / (n + 1) * (1 - Math.min(1, square)) + Math.min(1, square);
    work = s; tail = s * (longest(n, load.variation) - least);
  } else {
    work = n * s / workers; tail = s * (longest(workers, load.variation) - (1 + square) / 2);
  }
  const workerSeconds = work + stall + tail;
  const forced = load.quota === Infinity ? 0 : Math.max(0, calls - tokensOf(load)) / load.quota;
  const quotaSeconds = forced > 0 ? forced + load.latency + lastKey : 0;
  return { seconds: Math.max(workerSeconds, quotaSeconds), calls, messagesPerKey: perKey,
    workerSeconds, stallSeconds: stall, quotaSeconds };
}

function cycleOf(load, perFetch) {
  const busy = perFetch * load.service / load.workers;
  const left = load.prefetch + 1 - load.batch;
  const wait = load.latency - Math.min(left, perFetch) * load.service / load.workers;
  let stall = stallOf(wait, load.service, load.variation);
  if (load.prefetch < load.batch) stall += (wait - stall) / load.workers;
  return Math.max(load.latency + perFetch * load.handing, busy + stall);
}

function byAge(load, lifeRate, rate, most, groups, ahead) {
  if (load.maxAge === Infinity) return most;
  const waited = Math.min(ahead - 1, rate * load.latency);
  if (groups > 1) return Math.max(1, Math.min(most, 1 + (waited + lifeRate * load.maxAge) / groups));
  let lists = (waited + lifeRate * load.maxAge) / load.batch;
  const unequal = load.variation * load.variation / load.batch + (1 - 1 / load.workers) / load.batch ** 2;
  const sharp = Math.exp(-2 * Math.PI * Math.PI * unequal * lists);
  lists += sharp * (Math.ceil(lists) - lists) + (1 - sharp) * (1 + unequal) / 2;
  return Math.max(1, Math.min(most, load.batch * lists));
}

function renewed(load, rate, perKey, ahead) {
  const files = load.files - (load.closing ? 1 : 0);
  const waited = Math.min(ahead - 1, rate * load.latency);
  const drawn = Math.max(0, files - ahead + load.idle * rate);
  const renewals = drawn > perKey - waited ? Math.floor((drawn + waited) / perKey) : 0;
  const since = files + (load.idle + load.latency) * rate - renewals * perKey;
  const late = load.closing && since > waited + load.maxAge * rate ? 1 : 0;
  return [1 + renewals + late, late];
}

function sharedOf(load) {
  const n = load.files, workers = load.workers, s = load.service, latency = load.latency;
  const rate = s > 0 ? workers / s : Infinity;
  const groups = Math.min(load.groups, n), ahead = workers + load.prefetch;
  let runs, run, most, exact;
  if (load.dataKeys) {
    runs = Math.min(load.dataKeys, n); run = n / runs; most = run; exact = true;
  } else {
    runs = groups; run = n / groups;
    most = Math.min(load.maxMessages, messagesByBytes(load.maxBytes, load.size, load.sizeVariation));
    exact = load.maxBytes === Infinity || load.sizeVariation === 0;
    if (groups > load.capacity) { most = Math.min(most, 1 / (1 - load.capacity / groups)); exact = false; }
  }
  const interleaved = load.dataKeys ? 1 : groups;
  let perKey = byAge(load, rate, rate, most, interleaved, ahead);
  if (interleaved > 1 && load.maxAge !== Infinity) {
    for (let i = 0; i < 100; i++) {
      const slowest = runs * run / perKey > tokensOf(load) ? 1 / load.quota : 0;
      const lifeRate = Math.min(rate, perKey / Math.max(cycleOf(load, perKey), slowest));
      const before = perKey;
      perKey = byAge(load, lifeRate, rate, most, interleaved, ahead);
      if (Math.abs(perKey - before) < 1e-3 * before) break;
    }
  }
  const aged = perKey < most && !load.dataKeys;
  let calls, last = 0;
  if (aged && interleaved === 1 && s > 0) [calls, last] = renewed(load, rate, perKey, ahead);
  else calls = runs * keysFor(run, perKey, exact && !aged, interleaved);
  calls = Math.min(n, calls);
  const perFetch = n / calls;
  const wait = Math.max(0, cycleOf(load, perFetch) - perFetch * s / workers);
  const first = latency * (interleaved > 1 ? interleaved : 1);
  const stall = first + Math.max(0, calls - last - interleaved) * wait + last * latency;
  return finish(load, calls, perKey, stall, Math.min(perFetch, n) * s / workers);
}

// Python's round(): halves go to the even number.
function roundEven(value) {
  const floor = Math.floor(value), rest = value - floor;
  if (rest !== 0.5) return Math.round(value);
  return floor % 2 === 0 ? floor : floor + 1;
}

function estimate(job) {
  const files = Math.ceil(job.files / job.hosts), share = files / job.files, busyHosts = Math.min(job.hosts, job.files);
  const mean = job.bytes / job.files;
  const points = page.sizes.map((point) => page.mean ? point * mean / page.mean : mean);
  const count = points.length;
  const framesOf = points.reduce((sum, point) => sum + Math.floor(point / job.frame_size) + 1, 0) / count;
  const middle = points.reduce((sum, point) => sum + point, 0) / count;
  const variance = points.reduce((sum, point) => sum + (point - middle) ** 2, 0) / count;
  const variation = middle ? Math.sqrt(variance) / middle : 0;
  const spans = points.reduce((sum, p) => sum + (p > page.split ? Math.ceil(p / page.span) : 1), 0) / count;

  const oneByOne = points.filter((p) => p >= Math.min(job.frame_size, page.small)).length / count;
  const bytes = job.bytes * share, singles = page.columns ? files * oneByOne : 0, frames = framesOf * files, workers = job.workers;
  const cores = Math.max(page.cores, workers !== page.workers ? workers : page.cores);
  const size = bytes / Math.max(files, 1);
  const batch = Math.trunc(Math.max(1, Math.min(page.batch_files, Math.floor(files / (4 * workers)))));
  const listFiles = size ? Math.max(1, Math.min(batch, Math.trunc(page.batch_bytes / size))) : batch;
  const sample = Math.min(files, page.sample);
  const interpreter = (n, m) => n * page.interpreter[0] + m * page.interpreter[1];
  const processes = workers > 1 && !page.on_store
    && interpreter(sample, frames * sample / Math.max(files, 1)) > page.processes_pay;
  const waiting = page.on_store || (workers > 1 && page.sync);
  const inTurns = !(waiting || processes || bytes * page.unlocked_per_byte > interpreter(files, frames));
  let tasks = Math.min(files, Math.max(files / batch, bytes / page.batch_bytes));
  if (size > page.split && !page.signed) tasks = Math.max(files, bytes / page.span);
  const usable = Math.max(1, Math.min(workers, cores));
  const whole = Math.max(1, roundEven(tasks));
  const p = inTurns ? 1 : whole < 4 * usable ? whole / Math.ceil(whole / usable) : usable;
  const sync = page.sync ? 1 : 0, signed = page.signed ? 1 : 0, lock = processes ? 0 : 1, free = 1 - lock;
  const contended = processes || inTurns ? 0 : files * (1 - 1 / workers);
  const features = { start: 1, starting: free, process: free * workers, file_lock: lock * files,
    file_contended: contended, file_serial: free * files, file: free * files / p, single: singles * (lock + free / p),
    frame: frames * (lock + free / p), byte_serial: bytes, byte: bytes / p,
    sync_serial: sync * files, sync: sync * files / p, sync_byte: sync * bytes,
    signature_serial: signed * files, signature: signed * files / p, hash: signed * bytes / p, key: 0 };
  const product = {};
  let total = 0;
  for (const [name, value] of Object.entries(page.coefficients)) total += product[name] = value * features[name];
  const starting = product.starting + product.process;
  const overhead = product.start + starting, busy = Math.max(total - overhead, 1e-9);
  const bySize = page.by_size.reduce((sum, name) => sum + product[name], 0) / busy;
  const apart = files * page.manifest_line > page.manifest_held, own = apart && !page.reading ? 1 : 0;
  const lanes = Math.max(1, roundEven(p)), messages = files + 1 - own;
  const pieces = page.signed ? 1 : Math.max(1, roundEven(spans));
  const cacheMessages = job.cache ? job.cache_max_messages : 1;
  const cacheBytes = job.cache ? job.cache_max_bytes : Infinity;
  let dataKeys = 0;
  if (page.reading) {
    const perKey = Math.min(job.cache_max_messages, messagesByBytes(job.cache_max_bytes, middle, variation));
    dataKeys = page.data_keys ? Math.max(1, roundEven(page.data_keys / job.hosts))
      : Math.max(page.contexts, Math.ceil((files + (apart ? 0 : 1)) / perKey)) + (apart ? 1 : 0);
    if (!job.cache) dataKeys = messages;
  }
  const load = { files: messages, workers: lanes, service: busy * lanes / messages,
    variation: pieces > 1 ? 0 : variation * bySize, latency: job.kms_latency * page.questions + page.coefficients.key,
    quota: job.kms_quota / busyHosts / page.questions, maxMessages: cacheMessages,
    maxAge: job.cache ? job.cache_max_age : Infinity, maxBytes: cacheBytes, size: middle,
    sizeVariation: variation, groups: Math.min(page.contexts, files),
    prefetch: inTurns ? listFiles - 1 : Math.max(0, page.lists_held * listFiles * Math.min(workers, files) - lanes),
    dataKeys, capacity: page.capacity, pieces, batch: listFiles, handing: product.file_serial / messages,
    idle: starting, closing: !page.reading && !own };
  const outcome = sharedOf(load);
  const overheadBytes = job.files * (page.header + 8 + (page.signed ? 105 : 0)) + 32 * framesOf * job.files;
  const out = page.writing === "message" ? job.bytes + overheadBytes : page.writing === "plain" ? job.bytes : 0;
  const bounds = [page.read_bandwidth ? job.bytes * share / page.read_bandwidth : 0,
    Math.max(page.write_bandwidth ? out * share / page.write_bandwidth : 0,
      page.held_back === null ? 0 : Math.max(0, out * share - page.held_back) * page.coefficients.sync_byte),
    page.network_bandwidth ? (job.bytes + out) * share / page.network_bandwidth : 0];
  const all = [outcome.seconds, ...bounds.filter((bound) => bound > 0)], top = Math.max(...all);
  const joined = all.length > 1
    ? top * Math.pow(all.reduce((sum, value) => sum + Math.pow(value / top, page.knee), 0), 1 / page.knee) : top;
  const cpuFeatures = { start: 1, process: free * workers, file_lock: lock * files, file_contended: contended, file: free * files, single: singles, frame: frames,
    byte: bytes, sync: sync * files, sync_byte: sync * bytes, signature: signed * files, hash: signed * bytes,
    key: outcome.calls };
  let cpuSeconds = 0;
  for (const [name, value] of Object.entries(page.cpu_coefficients)) cpuSeconds += value * cpuFeatures[name];
  const alone = cpuSeconds > 0 ? Math.min(1, interpreter(files, frames) / cpuSeconds) : 0;
  const coresBusy = processes ? p : 1 + (p - 1) * (1 - alone), worked = overhead + busy;
  const known = !page.in_memory && Object.values(page.cpu_coefficients).some((value) => value);
  const cpu = known ? Math.min(worked, cpuSeconds / coresBusy) : worked;
  const stored = worked - cpu, readsOnly = page.writing === "nothing";
  const quotaBound = outcome.quotaSeconds && outcome.quotaSeconds >= 0.97 * outcome.seconds;
  const parts = { "cpu": cpu,
    "storage-write": Math.max(bounds[1], readsOnly ? 0 : stored), "storage-read": Math.max(bounds[0], readsOnly ? stored : 0),
    "network": bounds[2],
    "kms-latency": !quotaBound && outcome.quotaSeconds <= outcome.workerSeconds ? outcome.stallSeconds : 0,
    "kms-quota": outcome.quotaSeconds };
  const limit = Object.keys(parts).reduce((best, name) => parts[name] > parts[best] ? name : best);
  const seconds = overhead + joined, calls = (outcome.calls + own) * busyHosts;
  const partOf = (p) => Math.max(page.part, Math.ceil(Math.ceil(p) / (page.most_parts - 1)));
  const inParts = points.map((p) => Math.ceil(p / partOf(p)));
  const puts = readsOnly ? 0 : inParts.reduce((sum, n) => sum + (n > 1 ? n + 2 : 1), 0) / count * job.files;
  const gets = points.reduce((sum, p) => sum + Math.max(1, Math.ceil(p / page.part)), 0) / count * job.files;
  const cost = {
    kms_requests: Math.max(0, roundEven(calls * page.questions) - page.free_requests) * page.request_price,
    kms_keys: page.keys * page.key_month * Math.max(seconds / 3600, 1) / page.hours_per_month,
    compute: page.host_hour * job.hosts * seconds / 3600,
    store_requests: page.object_store ? puts * page.put_request + gets * page.get_request : 0 };
  cost.total = cost.kms_requests + cost.kms_keys + cost.compute + cost.store_requests;
  return { seconds, calls, limit, parts, cost };
}

const size = (value) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (value >= 1024 && unit < 5) { value /= 1024; unit++; }
  return `${Number(value.toPrecision(4))} ${units[unit]}`;
};
const duration = (seconds) => seconds < 120 ? `${Number(seconds.toPrecision(3))} s`
  : seconds < 7200 ? `${Number((seconds / 60).toPrecision(3))} min`
  : seconds < 259200 ? `${Number((seconds / 3600).toPrecision(3))} h` : `${Number((seconds / 86400).toPrecision(3))} days`;
// As report._cost_note.
const costNote = (cost) => {
  const store = cost.store_requests ? `, store ${cost.store_requests.toFixed(2)}` : "";
  return `compute ${cost.compute.toFixed(2)}, KMS ${(cost.kms_requests + cost.kms_keys).toFixed(2)}${store}`;
};
const whole = (value) => Math.round(value).toLocaleString("en");

// name, label, format, lowest and highest factor of the plan's value, whole numbers only
const SLIDERS = [
  ["bytes", "plaintext", size, 1 / 64, 64, true], ["files", "files", whole, 1 / 64, 64, true],
  ["hosts", "hosts", whole, 1, 64, true], ["workers", "workers per host", whole, 1 / 8, 8, true],
  ["frame_size", "frame length", size, 1 / 256, 8, true],
  ["kms_latency", "KMS latency", (v) => `${Number((v * 1000).toPrecision(3))} ms`, 1 / 32, 32, false],
  ["kms_quota", "KMS quota, calls a second", whole, 1 / 1024, 8, false],
  ["cache_max_messages", "cache: messages per data key", whole, 1e-6, 16, true],
  ["cache_max_age", "cache: age of a data key", duration, 1 / 1024, 64, false],
];
const job = { cache: PLAN.inputs.cache, cache_max_bytes: PLAN.inputs.cache_max_bytes };
for (const [name] of SLIDERS) job[name] = page.start[name];

function show() {
  const now = estimate(job);
  document.getElementById("seconds").textContent = duration(now.seconds);
  document.getElementById("limit").textContent = now.limit;
  document.getElementById("calls").textContent = whole(now.calls);
  document.getElementById("cost").textContent = `${now.cost.total.toFixed(2)} USD`;
  document.getElementById("cost-note").textContent = costNote(now.cost);
  const most = Math.max(...Object.values(now.parts)) || 1;
  for (const bar of document.querySelectorAll("#parts .bar")) {
    const value = now.parts[bar.dataset.name] || 0;
    bar.querySelector("i").style.width = `${value / most * 100}%`;
    bar.querySelector(".figure").textContent = duration(value);
  }
  for (const [key, value] of [["seconds", now.seconds], ["calls", now.calls], ["limit", now.limit], ["cost", now.cost.total]])
    document.body.dataset[key] = value;
}

const form = document.getElementById("sliders");
for (const [name, label, format, low, high, integer] of SLIDERS) {
  const start = job[name];
  const least = integer ? Math.max(1, start * low) : start * low, most = Math.max(start * high, least * 2);
  const row = document.createElement("label"), output = document.createElement("output"), input = document.createElement("input");
  row.append(label, output, input);
  input.type = "range"; input.name = name; input.min = 0; input.max = 1000; input.step = 1;
  // The position is the logarithm of the value; the plan's own value is exact until the slider moves.
  const at = (value) => Math.log(value / least) / Math.log(most / least) * 1000;
  input.value = at(start);
  output.textContent = format(start);
  input.addEventListener("input", () => {
    const value = least * Math.pow(most / least, input.value / 1000);
    job[name] = integer ? Math.max(1, Math.round(value)) : value;
    output.textContent = format(job[name]);
    show();
  });
  form.append(row);
}
// A link may carry values: page.html#hosts=8&kms_quota=100
const asked = new URLSearchParams(location.hash.slice(1));
for (const [name, label, format] of SLIDERS) {
  if (asked.has(name) && Number(asked.get(name)) > 0) {
    job[name] = Number(asked.get(name));
    form.elements[name].previousElementSibling.textContent = format(job[name]);
  }
}
window.streamcryptEstimate = (changes) => estimate({ ...job, ...changes });
if (asked.size) show();
