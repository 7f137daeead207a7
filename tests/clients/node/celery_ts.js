// Call tasks with celery-ts and print what it makes of their results. No worker.
//
// node celery_ts.js BROKER_URL RESULT_URL CALLS    CALLS: JSON, [{task, args, kwargs, options, timeout_ms}, ...]
// prints one JSON list, an entry per call: {value} or {error}. A failed task is a value here: celery-ts does not throw.

const { createClient } = require("celery-ts");

const DEFAULT_TIMEOUT_MS = 15000;

function optionsOf(call) {
  const { eta, expires, ...others } = call.options || {};
  return {
    args: call.args || [],
    kwargs: call.kwargs || {},
    ...others,
    ...(eta && { eta: new Date(eta) }),
    ...(expires && { expires: new Date(expires) }),
  };
}

async function outcomeOf(result, timeoutMs) {
  try {
    return { value: await result.get(timeoutMs) };
  } catch (error) {
    return { error: error.message };
  }
}

async function main([brokerUrl, resultBackend, calls]) {
  const client = createClient({ brokerUrl, resultBackend });
  // It declares its reply queue, or subscribes to results in Redis, beside sending: what a quick worker answers before
  // that is lost to it.
  await client.backend.consumerTag;
  await client.backend.subscriber;
  const results = JSON.parse(calls).map((call) => ({
    result: client.createTask(call.task).applyAsync(optionsOf(call)),
    timeoutMs: call.timeout_ms || DEFAULT_TIMEOUT_MS,
  }));
  const outcomes = await Promise.all(results.map(({ result, timeoutMs }) => outcomeOf(result, timeoutMs)));
  // Its connections have no orderly end while a result is still awaited.
  process.stdout.write(JSON.stringify(outcomes), () => process.exit(0));
}

main(process.argv.slice(2));
