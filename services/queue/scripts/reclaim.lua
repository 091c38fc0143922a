-- Take over entries whose lease ran out; bury those that were delivered too often or expired.
-- ARGV: namespace, consumer group, consumer, lease ms, count, max deliveries, ran out, recover,
-- held ids ... `ran out` = 1: take entries whose lease ran out. `recover` = 1: take entries that are
-- already this consumer's but not held: the reply that delivered them was lost, and that delivery
-- is not counted twice. Returns rows of (entry id, deliveries, flat fields).
local consumer, lease_ms = ARGV[3], tonumber(ARGV[4])
local count, max_deliveries = tonumber(ARGV[5]), tonumber(ARGV[6])
local held, taken = {}, {}
for i = 9, #ARGV do held[ARGV[i]] = true end
local scan = count + #ARGV + 64

local function take(id, deliveries, flat)
  if #taken < count then
    redis.call('XCLAIM', STREAM, GROUP, consumer, 0, id, 'RETRYCOUNT', deliveries, 'JUSTID')
    held[id] = true
    taken[#taken + 1] = {id, deliveries, flat}
  end
end

local function visit(id, deliveries, next_deliveries)
  local flat = read_entry(id)
  if not flat then
    redis.call('XACK', STREAM, GROUP, id)
  elseif expired(to_table(flat)) then
    bury(id, deliveries, EXPIRED_ERROR, 'expired')
  elseif next_deliveries > max_deliveries then
    local entry = to_table(flat)
    local failure = entry.view and entry.group
      and redis.call('HGET', NAMESPACE .. ':group:' .. entry.group, 'failure:' .. entry.view)
    bury(id, deliveries, failure or ('UNAVAILABLE: ' .. deliveries
      .. ' deliveries and no answer: each worker died or lost its lease'), 'dead')
  else
    take(id, next_deliveries, flat)
  end
end

if ARGV[7] == '1' then
  for _, row in ipairs(redis.call('XPENDING', STREAM, GROUP, 'IDLE', lease_ms, '-', '+', scan)) do
    if not held[row[1]] then visit(row[1], row[4], row[4] + 1) end
  end
end
if ARGV[8] == '1' then
  for _, row in ipairs(redis.call('XPENDING', STREAM, GROUP, '-', '+', scan, consumer)) do
    -- Idle for a whole lease: failed or released, and not yet delivered again.
    local next_deliveries = row[3] >= lease_ms and row[4] + 1 or row[4]
    if not held[row[1]] then visit(row[1], row[4], next_deliveries) end
  end
end
return taken
