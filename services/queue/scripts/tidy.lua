-- Forget consumers that are silent and hold nothing, then trim what everybody has acknowledged.
-- A live consumer that is forgotten by mistake is created again by its next read.
-- ARGV: namespace, consumer group, consumer that asks, silence ms. Returns entries trimmed.
for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', STREAM, GROUP)) do
  local info = to_table(flat)
  if info.name ~= ARGV[3] and info.pending == 0 and info.idle > tonumber(ARGV[4]) then
    redis.call('XGROUP', 'DELCONSUMER', STREAM, GROUP, info.name)
  end
end
return trim(STREAM)
