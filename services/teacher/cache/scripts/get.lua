-- Entries by key; what is found becomes recent and stays another ttl.
-- KEYS: order, then one value each. ARGV: ttl in ms, then the hex digest of each value's key.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local values = {}
for i = 2, #KEYS do
  local value = redis.call('GET', KEYS[i])
  values[i - 1] = value
  if value then
    redis.call('PEXPIRE', KEYS[i], ARGV[1])
    redis.call('ZADD', KEYS[1], 'XX', now, ARGV[i] .. ':' .. #value)
  end
end
return values
