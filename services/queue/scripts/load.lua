-- How much work is in front of one consumer group, at one instant, and in bounded time whatever has piled up.
-- ARGV: namespace, consumer group, lease ms (0: what is delivered stays with its reader, idle or not).
-- Returns: entries, waiting, in flight, consumers, age of the oldest unfinished entry in ms, queued tokens,
-- waiting tokens, tokens in flight, then the counters scored, dead and expired.
-- Waiting is what nobody holds: never delivered, handed back, or with a lease that ran out.
local lease_ms = tonumber(ARGV[3])
local MAX_HANDED_BACK, MAX_READ, MAX_MALFORMED = 4096, 256, 16

local function counters(...)
  local found = redis.call('HMGET', LOAD, ...)
  for i = 1, #found do found[i] = tonumber(found[i] or 0) end
  return unpack(found)
end

local function oldest(...)
  local lowest
  for i = 1, select('#', ...) do
    local id = select(i, ...)
    local ms = id and tonumber(id:match('^%d+'))
    if ms and (not lowest or ms < lowest) then lowest = ms end
  end
  return lowest and math.max(0, now_ms() - lowest) or 0
end

-- Each entry knows how many tokens were added before it, so nothing behind the first one is read. Entries of
-- a version that did not count so know their own; a front of nothing else gets its share of all by number.
local function tokens_from(entries, fresh, pending, queued, added)
  local passed = 0
  for _, entry in ipairs(entries) do
    local fields = to_table(entry[2])
    local before = tonumber(fields.before)
    if before then return passed + added - before end
    passed = passed + (tonumber(fields.tokens) or 0)
  end
  if passed == 0 then return 0 end
  return math.floor(queued * fresh / (fresh + pending) + 0.5)
end

-- Entries and tokens of those among the pending ones that anyone may claim. Exact for all of them, or up to
-- MAX_READ; beyond, their tokens are estimated from MAX_READ spread over them.
local function handed_back(pending, tokens)
  if lease_ms == 0 or pending == 0 then return 0, 0 end
  local rows = redis.call('XPENDING', STREAM, GROUP, 'IDLE', lease_ms, '-', '+', MAX_HANDED_BACK)
  if #rows == pending or #rows == 0 or tokens == 0 then return #rows, #rows > 0 and tokens or 0 end
  local sum, read = 0, 0
  for i = 1, #rows, math.ceil(#rows / MAX_READ) do
    local flat = read_entry(rows[i][1])
    sum, read = sum + (tonumber(flat and to_table(flat).tokens) or 0), read + 1
  end
  return #rows, math.min(tokens, math.floor(sum * #rows / read + 0.5))
end

local queued, added, scored, dead, expired =
  counters('queued_tokens', 'added_tokens', 'scored', 'dead', 'expired')
local length = redis.call('XLEN', STREAM)
local group = {['last-delivered-id'] = '0-0', pending = 0, consumers = 0, lag = length}
if redis.call('EXISTS', STREAM) == 1 then
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', STREAM)) do
    local info = to_table(flat)
    if info.name == GROUP then group = info end
  end
end
local after = '(' .. group['last-delivered-id']
-- Not known once somebody has deleted an entry by hand.
local fresh = group.lag or #redis.call('XRANGE', STREAM, after, '+', 'COUNT', MAX_HANDED_BACK)
local front = fresh > 0 and redis.call('XRANGE', STREAM, after, '+', 'COUNT', MAX_MALFORMED) or {}
local first_pending = group.pending > 0 and redis.call('XPENDING', STREAM, GROUP)[2]

local from_front = tokens_from(front, fresh, group.pending, queued, added)
local fresh_tokens = math.max(0, math.min(queued, from_front))
local back, back_tokens = handed_back(group.pending, queued - fresh_tokens)
return {
  length, fresh + back, group.pending - back, group.consumers,
  oldest(front[1] and front[1][1], first_pending), queued,
  fresh_tokens + back_tokens, queued - fresh_tokens - back_tokens, scored, dead, expired,
}
