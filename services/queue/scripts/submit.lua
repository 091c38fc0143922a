-- Store a group once and queue one job per view.
-- KEYS: orders stream, its load hash, its dead letters, group hash, submitted set of the order,
--       then (jobs stream, load hash) per view.
-- ARGV: namespace, orders consumer group, run, group id, group bytes, token limit, deadline ms
--       or '', traceparent, order entry id or '', order consumer, then (view, request, tokens, teacher).
-- Returns: queued | exists | full | lost.
local run, group_id, group_bytes = ARGV[3], ARGV[4], ARGV[5]
local limit, deadline, traceparent = tonumber(ARGV[6]), ARGV[7], ARGV[8]
local order_entry, order_consumer = ARGV[9], ARGV[10]
local group, submitted = KEYS[4], KEYS[5]
local FIRST_KEY, FIRST_ARG = 6, 11
local JOBS_GROUP = 'replicas'  -- as keys.py names it
local PER_VIEW = 4
local views = (#ARGV - FIRST_ARG + 1) / PER_VIEW

if order_entry ~= '' then
  if lease_of(order_entry) ~= order_consumer then return 'lost' end
  -- Remembered apart from the payload: a group may be trained and deleted before its order ends.
  if redis.call('SISMEMBER', submitted, group_id) == 1 then return 'exists' end
end
if redis.call('EXISTS', group) == 1 then
  if order_entry ~= '' then redis.call('SADD', submitted, group_id) end
  return 'exists'
end

-- Known also when the group is refused: what fills the queue may be from a version that kept no names, and
-- who scales teachers by these figures must see it.
redis.call('SADD', NAMESPACE .. ':runs', run)
local asked = {}
for i = 0, views - 1 do
  local load = KEYS[FIRST_KEY + 2 * i + 1]
  redis.call('SADD', NAMESPACE .. ':teachers', ARGV[FIRST_ARG + PER_VIEW * i + 3])
  asked[load] = (asked[load] or 0) + tonumber(ARGV[FIRST_ARG + PER_VIEW * i + 2])
end
for load, tokens in pairs(asked) do
  local queued = tonumber(redis.call('HGET', load, 'queued_tokens') or 0)
  -- An empty queue takes any group, or one larger than the limit would wait for ever.
  if queued > 0 and queued + tokens > limit then return 'full' end
end

redis.call('HSET', group, 'group', group_bytes, 'run', run, 'pending', views, 'status', 'queued')
if order_entry ~= '' then redis.call('SADD', submitted, group_id) end
for i = 0, views - 1 do
  local jobs, load = KEYS[FIRST_KEY + 2 * i], KEYS[FIRST_KEY + 2 * i + 1]
  local view, request, tokens = unpack(ARGV, FIRST_ARG + PER_VIEW * i, FIRST_ARG + PER_VIEW * i + 2)
  redis.call('HSET', group, 'request:' .. view, request)
  -- How many tokens were added before it: so what waits is known from the first entry that waits.
  local before = redis.call('HINCRBY', load, 'added_tokens', tokens) - tokens
  local entry = {'group', group_id, 'view', view, 'run', run, 'tokens', tokens,
    'before', string.format('%d', before)}
  if deadline ~= '' then entry[#entry + 1] = 'deadline'; entry[#entry + 1] = deadline end
  if traceparent ~= '' then entry[#entry + 1] = 'traceparent'; entry[#entry + 1] = traceparent end
  -- Made with the stream and not by the first replica: what waits must be known while there is none,
  -- or an autoscaler that asks for the group's lag would never start one.
  if redis.call('EXISTS', jobs) == 0 then redis.call('XGROUP', 'CREATE', jobs, JOBS_GROUP, '0', 'MKSTREAM') end
  redis.call('XADD', jobs, '*', unpack(entry))
  redis.call('HINCRBY', load, 'queued_tokens', tokens)
end
if views == 0 then
  redis.call('HSET', group, 'status', 'scored')
  push_scored(run, group_id, 'scored')
end
return 'queued'
