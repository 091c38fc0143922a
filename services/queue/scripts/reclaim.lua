-- Take over entries whose lease ran out; bury those that were delivered too often or expired.
-- ARGV: namespace, consumer group, consumer, lease ms, count, max deliveries, recover, held ids ...
-- `recover` = 1: also take entries that are already this consumer's but not held: the reply that
-- delivered them was lost. Returns rows of (entry id, deliveries, flat fields).
local consumer, lease_ms = ARGV[3], ARGV[4]
local count, max_deliveries = tonumber(ARGV[5]), tonumber(ARGV[6])
local held, taken = {}, {}
for i = 8, #ARGV do held[ARGV[i]] = true end
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
    local failure = entry.view
      and redis.call('HGET', NAMESPACE .. ':group:' .. entry.group, 'failure:' .. entry.view)
    bury(id, deliveries, failure or ('UNAVAILABLE: ' .. deliveries
      .. ' deliveries and no answer: each worker died or lost its lease'), 'dead')
  else
    take(id, next_deliveries, flat)
  end
end

for _, row in ipairs(redis.call('XPENDING', STREAM, GROUP, 'IDLE', lease_ms, '-', '+', scan)) do
  if not held[row[1]] then visit(row[1], row[4], row[4] + 1) end
end
if ARGV[7] == '1' then
  for _, row in ipairs(redis.call('XPENDING', STREAM, GROUP, '-', '+', scan, consumer)) do
    if not held[row[1]] then visit(row[1], row[4], row[4]) end
  end
end
return taken
