"""The Lua scripts of the Redis broker: each changes what several keys say of a message in one step, or not at all.

A taken message is ``[<envelope>, "<exchange>", "<routing key>"]`` in the hash ``unacked``, with the time in the sorted
set ``unacked_index``, as kombu keeps it. The field is ``<owner>:<number>`` and never used twice: a verdict on a message
that somebody else has taken back by then finds nothing. An owner's score in the leases: above 0, until when it is
trusted; below 0, since when it is suspected to be dead; 0, buried.
"""

from __future__ import annotations

from typing import Final

#: Error code of an owner who may take nothing any more.
LEASE_LOST: Final = "LEASELOST"

#: Takes up to ARGV[3] messages, and no more once they have ARGV[4] bytes, from all queues: by urgency, then in turns,
#: or from each queue all that it has before the next one (queue to begin with: -1). Of one that is longer than ARGV[5]
#: only the first ARGV[6] bytes are returned.
#: KEYS: leases, unacked, its index, then each queue's lists, the most urgent first.
#: ARGV: owner, number for the first message, how many, bytes, the longest, bytes of one that is longer, lists per
#: queue, queue to begin with, then for each queue the end of its records.
#: Returns [1 when nothing was left, error text, queue, [envelopes], queue, [envelopes]...].
CLAIM: Final = """
local lease = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not lease or tonumber(lease) == 0 then
    return redis.error_reply('LEASELOST ' .. ARGV[1] .. ' was taken for dead')
end
-- Keys of a wrong type must fail before a message is popped: what a script has done stays done.
redis.call('HLEN', KEYS[2])
redis.call('ZCARD', KEYS[3])
local number, wanted, room = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local longest, sample = tonumber(ARGV[5]), tonumber(ARGV[6])
local steps, first = tonumber(ARGV[7]), tonumber(ARGV[8])
local count = #ARGV - 8
local clock = redis.call('TIME')
local now = string.format('%d.%06d', clock[1], clock[2])
local reply = {1, ''}
local strict = first < 0
for look = 0, strict and steps * count - 1 or steps - 1 do
    local active, step = {}, look + 1
    if strict then
        active[1], step = look % count, math.floor(look / count) + 1
    else
        for turn = 0, count - 1 do
            active[turn + 1] = (first + turn) % count
        end
    end
    while #active > 0 do
        local left = {}
        local share = math.max(1, math.floor(wanted / #active))
        for _, queue in ipairs(active) do
            if wanted == 0 or room <= 0 then
                reply[1] = 0
                return reply
            end
            local size = math.min(share, wanted, 100)
            local list, taken, records, scores = KEYS[3 + queue * steps + step], {}, {}, {}
            -- One by one: how long the next one is cannot be asked for.
            while #taken < size and room > 0 do
                local envelope = redis.pcall('RPOP', list)
                if not envelope then
                    break
                elseif envelope.err then
                    reply[2] = list .. ': ' .. envelope.err
                    break
                end
                local field = string.format('%s:%d', ARGV[1], number)
                number, room = number + 1, room - #envelope
                records[#records + 1], records[#records + 2] = field, '[' .. envelope .. ARGV[9 + queue]
                scores[#scores + 1], scores[#scores + 2] = now, field
                taken[#taken + 1] = #envelope > longest and string.sub(envelope, 1, sample) or envelope
            end
            if #taken > 0 then
                redis.call('HSET', KEYS[2], unpack(records))
                redis.call('ZADD', KEYS[3], unpack(scores))
                reply[#reply + 1], reply[#reply + 2] = queue, taken
                wanted = wanted - #taken
            end
            if #taken == size or room <= 0 then
                left[#left + 1] = queue
            end
        end
        active = left
    end
end
return reply
"""

#: Forgets messages that are done. KEYS: unacked, its index. ARGV: fields. Returns how many were still there.
SETTLE: Final = """
local count = redis.call('HDEL', KEYS[1], unpack(ARGV))
redis.call('ZREM', KEYS[2], unpack(ARGV))
return count
"""

#: Reads the records of taken messages until they have ARGV[1] bytes; of one that is longer than ARGV[2] only where it
#: goes back to, behind an empty envelope. KEYS: unacked. ARGV: bytes, the longest, fields.
#: Returns the records of the first fields, false for those that are not there.
READ: Final = """
local room, longest, records = tonumber(ARGV[1]), tonumber(ARGV[2]), {}
for at = 3, #ARGV do
    local record = redis.call('HGET', KEYS[1], ARGV[at])
    if record and #record > longest then
        local place = string.match(string.sub(record, -2000), ', "[^"]*", "[^"]*"%]$')
        record = place and '[' .. place or record
    end
    room = room - (record and #record or 0)
    if room < 0 and #records > 0 then
        break
    end
    records[#records + 1] = record
end
return records
"""

#: Moves taken messages to lists, those that are still there. KEYS: unacked, its index. ARGV: the command that pushes,
#: then for each message its field, its envelope (empty: as it is there), how many lists, the lists.
#: Returns how many were moved.
MOVE: Final = """
local at, moved = 2, 0
while at <= #ARGV do
    local count, envelope = tonumber(ARGV[at + 2]), ARGV[at + 1]
    if envelope == '' and count > 0 then
        local record = redis.call('HGET', KEYS[1], ARGV[at])
        envelope = record and string.match(record, '^%[(.*), "[^"]*", "[^"]*"%]$') or ''
    end
    if redis.call('HDEL', KEYS[1], ARGV[at]) == 1 then
        for each = 1, count do
            redis.call(ARGV[1], ARGV[at + 2 + each], envelope)
        end
        moved = moved + 1
    end
    redis.call('ZREM', KEYS[2], ARGV[at])
    at = at + 3 + count
end
return moved
"""

#: Puts taken messages, those that are still there, into the sorted sets of what waits for its time.
#: KEYS: unacked, its index, schedule. ARGV: for each message its field, the list it goes back to, the time.
#: Returns how many were put there.
POSTPONE: Final = """
local count = 0
for at = 1, #ARGV, 3 do
    local field, list, due = ARGV[at], ARGV[at + 1], ARGV[at + 2]
    local set = list .. '.delayed'
    local record = redis.call('HGET', KEYS[1], field)
    if record then
        local member = field .. ' ' .. string.match(record, '^%[(.*), "", ".-"%]$')
        -- Keys of a wrong type must fail before the message is taken away: what a script has done stays done.
        redis.call('ZCARD', KEYS[3])
        redis.call('ZCARD', set)
        redis.call('HDEL', KEYS[1], field)
        redis.call('ZADD', set, due, member)
        redis.call('ZADD', KEYS[3], 'LT', due, list)
        count = count + 1
    end
    redis.call('ZREM', KEYS[2], field)
end
return count
"""

#: Moves messages whose time is near to their lists, where they are taken next, the first one first.
#: KEYS: schedule. ARGV: seconds ahead, how many at most. Returns how many were moved, and a list that is none.
BRING_BACK: Final = """
local clock = redis.call('TIME')
local near = string.format('%d.%06d', clock[1] + ARGV[1], clock[2])
local room, broken = tonumber(ARGV[2]), ''
for _, list in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', near)) do
    local kind = redis.call('TYPE', list).ok
    if kind ~= 'list' and kind ~= 'none' then
        broken = list
    elseif room > 0 then
        local set = list .. '.delayed'
        local found = redis.call('ZRANGEBYSCORE', set, '-inf', near, 'LIMIT', 0, room)
        if #found > 0 then
            redis.call('ZREM', set, unpack(found))
        end
        for each = #found, 1, -1 do
            redis.call('RPUSH', list, string.sub(found[each], string.find(found[each], ' ', 1, true) + 1))
        end
        room = room - #found
        local first = redis.call('ZRANGE', set, 0, 0, 'WITHSCORES')
        if first[2] then
            redis.call('ZADD', KEYS[1], first[2], list)
        else
            redis.call('ZREM', KEYS[1], list)
        end
    end
end
return {ARGV[2] - room, broken}
"""

#: Renews an owner's lease and looks after the others'. One that has run out makes its owner suspect; when it was not
#: renewed for the grace either, the owner is buried. So a jump of the clock, or a server that hung, buries nobody.
#: KEYS: leases, the index. ARGV: owner, its lease in s, grace in s, visibility timeout in s, 1 to join, then the fields
#: that are to count as taken just now.
#: Returns [1 when the owner is trusted, [buried owners], [fields that are beyond the visibility timeout]].
RENEW: Final = """
local clock = redis.call('TIME')
local now = tonumber(string.format('%d.%06d', clock[1], clock[2]))
local lease = redis.call('ZSCORE', KEYS[1], ARGV[1])
if ARGV[5] ~= '1' and (not lease or tonumber(lease) == 0) then
    return {0, {}, {}}
end
-- A full server lets a script write that began with what takes no memory: it must not lose its workers as well.
redis.call('ZREM', KEYS[1], '')
redis.call('ZADD', KEYS[1], string.format('%.6f', now + tonumber(ARGV[2])), ARGV[1])
for each = 6, #ARGV do
    redis.call('ZADD', KEYS[2], 'XX', string.format('%.6f', now), ARGV[each])
end
local function mark(low, high, score)
    for _, owner in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], low, high)) do
        redis.call('ZADD', KEYS[1], score, owner)
    end
end
mark(string.format('%.6f', tonumber(ARGV[3]) - now), '(0', 0)
mark('(0', string.format('%.6f', now), string.format('%.6f', -now))
return {
    1,
    redis.call('ZRANGEBYSCORE', KEYS[1], 0, 0),
    redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', string.format('%.6f', now - tonumber(ARGV[4])), 'LIMIT', 0, 100),
}
"""
