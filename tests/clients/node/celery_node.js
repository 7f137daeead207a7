// Call tasks with celery-node and print what it makes of their results. No worker.
//
// node celery_node.js BROKER_URL RESULT_URL CALLS    CALLS: JSON, [{task, args, kwargs, protocol, timeout_ms}, ...]
// prints one JSON list, an entry per call: {value} or {error, exc_type, exc_message, exc_module}.

const { createClient } = require("celery-node");

const DEFAULT_TIMEOUT_MS = 15000;
const POLL_INTERVAL_MS = 50;

async function outcomeOf(result, timeoutMs) {
  try {
    return { value: await result.get(timeoutMs, POLL_INTERVAL_MS) };
  } catch (error) {
    const { exc_type, exc_message, exc_module } = error;
    return { error: error.message, exc_type, exc_message, exc_module };
  }
}

async function main([brokerUrl, resultUrl, calls]) {
  const client = createClient(brokerUrl, resultUrl);
  const results = JSON.parse(calls).map((call) => {
    client.conf.TASK_PROTOCOL = call.protocol || 2;
    const task = client.createTask(call.task);
    return { result: task.applyAsync(call.args, call.kwargs), timeoutMs: call.timeout_ms || DEFAULT_TIMEOUT_MS };
  });
  const outcomes = await Promise.all(results.map(({ result, timeoutMs }) => outcomeOf(result, timeoutMs)));
  await client.disconnect();
  process.stdout.write(JSON.stringify(outcomes), () => process.exit(0));
}

main(process.argv.slice(2));
