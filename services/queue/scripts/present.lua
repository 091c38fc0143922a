-- A process says that it lives, and forgets those of its role that have stopped saying so.
-- KEYS[1]: hash of the role, name -> "said expires", both in ms. ARGV: namespace, '', name, time to live ms.
local role, name, now = KEYS[1], ARGV[3], now_ms()
local last = now + tonumber(ARGV[4])
redis.call('HSET', role, name, string.format('%d %d', now, last))
for other, value in pairs(to_table(redis.call('HGETALL', role))) do
  local expires = tonumber(value:match(' (%d+)$'))
  if expires <= now then redis.call('HDEL', role, other) end
  last = math.max(last, expires)
end
redis.call('PEXPIREAT', role, string.format('%d', last))
