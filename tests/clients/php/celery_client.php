<?php
// Call tasks as celery-php does and print their results. A few lines of our own in its shape, not that library.
//
// php celery_client.php BROKER_URL RESULT_URL CALLS
//   RESULT_URL  over Redis the database; over RabbitMQ amqp://results?wait=consume|poll&expires_ms=N: how to wait for a
//               result (as with php-amqplib or with PECL), and the client's own idea of how long results are kept
//   CALLS       JSON: [{task, args, kwargs, protocol, options, timeout_ms, forget}, ...]
// prints one JSON list, an entry per call: the result document, or null when none came in time.
//
// What is kept of celery-php: ids of its own form; protocol 1 unless told otherwise; over RabbitMQ neither reply_to nor
// correlation_id, the result is awaited in a queue named after the task's id and bound to the exchange "celeryresults";
// over Redis the message's properties, and the result is read from the key "celery-task-meta-<id>" and deleted.
// Source: celery-php, src/CeleryAbstract.php and its three connectors (amqplib, PECL, Predis).

require_once 'PhpAmqpLib/autoload.php';
require_once 'Predis/Autoloader.php';

use PhpAmqpLib\Connection\AMQPStreamConnection;
use PhpAmqpLib\Exception\AMQPTimeoutException;
use PhpAmqpLib\Message\AMQPMessage;
use PhpAmqpLib\Wire\AMQPTable;

Predis\Autoloader::register();

const QUEUE = 'celery';
const RESULT_EXCHANGE = 'celeryresults';
const DEFAULT_TIMEOUT_MS = 15000;
const POLL_INTERVAL_MS = 50;

function headers_of(array $call, string $id): array
{
    $protocol = $call['protocol'] ?? 1;
    return $protocol === 1 ? [] : ['lang' => 'php', 'task' => $call['task'], 'id' => $id];
}

function body_of(array $call, string $id): string
{
    $args = $call['args'] ?? [];
    $kwargs = (object) ($call['kwargs'] ?? []);
    if (($call['protocol'] ?? 1) === 2) {
        return json_encode([$args, $kwargs, new stdClass()]);
    }
    $fields = ['id' => $id, 'task' => $call['task'], 'args' => $args, 'kwargs' => $kwargs];
    return json_encode($fields + ($call['options'] ?? []));
}

final class Amqp
{
    private AMQPStreamConnection $connection;

    // $consumes: wait as celery-php's php-amqplib connector does, else poll as its PECL connector.
    public function __construct(string $broker, private int $expires_ms, private bool $consumes)
    {
        $at = parse_url($broker);
        $vhost = rawurldecode(substr($at['path'] ?? '/', 1)) ?: '/';
        $this->connection = new AMQPStreamConnection($at['host'], $at['port'], $at['user'], $at['pass'], $vhost);
    }

    public function post(array $call, string $id): void
    {
        $channel = $this->connection->channel();
        $channel->queue_declare(QUEUE, false, true, false, false);
        $channel->exchange_declare(QUEUE, 'direct', false, true, false);
        $channel->queue_bind(QUEUE, QUEUE, QUEUE);
        $properties = ['content_type' => 'application/json', 'content_encoding' => 'UTF-8'];
        if ($headers = headers_of($call, $id)) {
            $properties['application_headers'] = new AMQPTable($headers);
        }
        $channel->basic_publish(new AMQPMessage(body_of($call, $id), $properties), QUEUE, QUEUE);
        $channel->close();
    }

    public function result(string $id, float $deadline): ?array
    {
        return $this->consumes ? $this->consume($id, $deadline) : $this->poll($id, $deadline);
    }

    private function declare($channel, string $id, string $binding): void
    {
        $arguments = $this->expires_ms ? new AMQPTable(['x-expires' => $this->expires_ms]) : [];
        $channel->queue_declare($id, false, true, false, true, false, $arguments);
        $channel->queue_bind($id, RESULT_EXCHANGE, $binding);
    }

    private function consume(string $id, float $deadline): ?array
    {
        $found = null;
        $channel = $this->connection->channel();
        $this->declare($channel, $id, '');
        $channel->basic_consume($id, '', false, false, false, false, function ($message) use (&$found) {
            $found = $message;
        });
        while ($found === null && microtime(true) < $deadline) {
            try {
                $channel->wait(null, false, POLL_INTERVAL_MS / 1000);
            } catch (AMQPTimeoutException) {
                continue;
            }
        }
        $channel->queue_delete($id);
        return $found === null ? null : json_decode($found->body, true);
    }

    private function poll(string $id, float $deadline): ?array
    {
        $channel = $this->connection->channel();
        while (microtime(true) < $deadline) {
            $this->declare($channel, $id, $id);
            $message = $channel->basic_get($id, true);
            if ($message !== null) {
                $channel->queue_delete($id);
                return json_decode($message->body, true);
            }
            usleep(POLL_INTERVAL_MS * 1000);
        }
        return null;
    }
}

final class Redis
{
    private Predis\Client $broker;
    private Predis\Client $results;

    public function __construct(string $broker, string $results)
    {
        $this->broker = self::connect($broker);
        $this->results = self::connect($results);
    }

    public function post(array $call, string $id): void
    {
        $this->broker->lpush(QUEUE, [json_encode([
            'body' => base64_encode(body_of($call, $id)),
            'headers' => (object) headers_of($call, $id),
            'content-type' => 'application/json',
            'content-encoding' => 'binary',
            'properties' => [
                'body_encoding' => 'base64',
                'reply_to' => $id,
                'delivery_info' => ['priority' => 0, 'routing_key' => QUEUE, 'exchange' => QUEUE],
                'delivery_mode' => 2,
                'delivery_tag' => $id,
            ],
        ])]);
    }

    public function result(string $id, float $deadline): ?array
    {
        $key = "celery-task-meta-$id";
        while (microtime(true) < $deadline) {
            if ($found = $this->results->get($key)) {
                $this->results->del([$key]);
                return json_decode($found, true);
            }
            usleep(POLL_INTERVAL_MS * 1000);
        }
        return null;
    }

    private static function connect(string $url): Predis\Client
    {
        $at = parse_url($url);
        $database = (int) substr($at['path'] ?? '/0', 1);
        return new Predis\Client(['host' => $at['host'], 'port' => $at['port'], 'database' => $database]);
    }
}

[, $broker, $results, $calls] = $argv;
$settings = [];
parse_str(parse_url($results, PHP_URL_QUERY) ?? '', $settings);
$client = str_starts_with($broker, 'redis:')
    ? new Redis($broker, $results)
    : new Amqp($broker, (int) ($settings['expires_ms'] ?? 0), ($settings['wait'] ?? 'consume') === 'consume');

$posted = [];
foreach (json_decode($calls, true) as $call) {
    $id = uniqid('php_', true);
    $client->post($call, $id);
    if (!($call['forget'] ?? false)) {
        $posted[$id] = $call['timeout_ms'] ?? DEFAULT_TIMEOUT_MS;
    }
}
$found = [];
foreach ($posted as $id => $timeout_ms) {
    $found[] = $client->result($id, microtime(true) + $timeout_ms / 1000);
}
echo json_encode($found), "\n";
