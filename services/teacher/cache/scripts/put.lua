-- Keep one entry unless it is there, make room for it, and say how many bytes are kept.
-- KEYS: order, bytes, value. ARGV: ttl in ms, limit in bytes, what an entry costs beside its value, hex
-- digest, value, prefix of values. `order` is sorted by last use; a member is digest:size.
local order, bytes = KEYS[1], KEYS[2]
local ttl, limit, extra = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local held = tonumber(redis.call('GET', bytes) or '0')
if redis.call('EXISTS', KEYS[3]) == 1 then
  return held
end

local function forget(member)
  local digest, size = string.match(member, '^(%x+):(%d+)$')
  redis.call('UNLINK', ARGV[6] .. digest)
  held = held - size - extra
end

redis.call('SET', KEYS[3], ARGV[5], 'PX', ttl)
if redis.call('ZADD', order, now, ARGV[4] .. ':' .. #ARGV[5]) == 1 then
  held = held + #ARGV[5] + extra
end
-- Expired values have left by themselves; here they stop counting.
for _, member in ipairs(redis.call('ZRANGEBYSCORE', order, '-inf', now - ttl, 'LIMIT', 0, 100)) do
  redis.call('ZREM', order, member)
  forget(member)
end
while held > limit do
  local oldest = redis.call('ZPOPMIN', order)
  if #oldest == 0 then
    held = 0
    break
  end
  forget(oldest[1])
end
redis.call('SET', bytes, string.format('%d', held))
return held
