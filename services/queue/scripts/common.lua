-- Shared by every script; placed in front of each one when it is loaded.
-- Convention: KEYS[1] stream, KEYS[2] its load hash, KEYS[3] its dead-letter stream;
-- ARGV[1] namespace, ARGV[2] consumer group. Keys of a job's group and run are derived from
-- the entry's own fields: one primary holds a run, so no slot has to be declared.
local STREAM, LOAD, DEAD = KEYS[1], KEYS[2], KEYS[3]
local NAMESPACE, GROUP = ARGV[1], ARGV[2]
local MAX_DEAD_LETTERS = 10000

local function to_table(flat)
  local result = {}
  for i = 1, #flat, 2 do result[flat[i]] = flat[i + 1] end
  return result
end

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function read_entry(id)
  local found = redis.call('XRANGE', STREAM, id, id)[1]
  return found and found[2]
end

-- consumer, idle ms and deliveries of a pending entry; nil when it is not pending.
local function lease_of(id)
  local row = redis.call('XPENDING', STREAM, GROUP, id, id, 1)[1]
  if row then return row[2], row[3], row[4] end
end

-- Acknowledge an entry and give its tokens back. True for exactly one caller per entry.
local function retire(id)
  if redis.call('XACK', STREAM, GROUP, id) == 0 then return false end
  local flat = read_entry(id)
  local tokens = tonumber(flat and to_table(flat).tokens) or 0
  if tokens > 0 then redis.call('HINCRBY', LOAD, 'queued_tokens', -tokens) end
  return true
end

-- Let anyone claim the entry from now on; `deliveries` is what the counter shows until then.
local function hand_back(id, consumer, lease_ms, deliveries)
  redis.call('XCLAIM', STREAM, GROUP, consumer, 0, id, 'IDLE', lease_ms,
    'RETRYCOUNT', deliveries, 'JUSTID')
end

local function push_scored(run, group, status)
  redis.call('XADD', NAMESPACE .. ':scored:' .. run, '*', 'group', group, 'status', status)
end

-- Retire an entry for good: dead letter, and its group (or order) says so.
local function bury(id, deliveries, error, counter)
  local flat = read_entry(id)
  if not retire(id) then return end
  redis.call('HINCRBY', LOAD, counter, 1)
  local entry = to_table(flat)
  redis.call('XADD', DEAD, 'MAXLEN', '~', MAX_DEAD_LETTERS, '*', 'entry', id, 'run', entry.run or '',
    'group', entry.group or '', 'view', entry.view or '', 'order', entry.id or '',
    'deliveries', deliveries, 'error', error)
  if entry.view and entry.group and entry.run then
    local group = NAMESPACE .. ':group:' .. entry.group
    if redis.call('HGET', group, 'status') == 'queued'
        and redis.call('HEXISTS', group, 'scores:' .. entry.view) == 0 then
      redis.call('HSET', group, 'error:' .. entry.view, error, 'status', 'failed')
      push_scored(entry.run, entry.group, 'failed')
    end
  elseif entry.id and entry.run then
    redis.call('HSET', NAMESPACE .. ':placed:' .. entry.run, entry.id, 'dead')
    -- As when it is finished: its lease is gone, so nobody can submit for it any more.
    redis.call('UNLINK', NAMESPACE .. ':submitted:' .. entry.run .. ':' .. entry.id)
  end
end

local function expired(entry)
  return entry.deadline and now_ms() > tonumber(entry.deadline)
end

local EXPIRED_ERROR = 'DEADLINE_EXCEEDED: the deadline passed while the job was queued'

-- Delete entries that every consumer group has read and acknowledged.
-- By MINID only: MAXLEN would delete pending entries, XDEL would make `lag` unknowable.
local function trim(stream)
  if redis.call('EXISTS', stream) == 0 then return 0 end
  local lowest
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local info = to_table(flat)
    local keep = info['last-delivered-id']
    local pending = redis.call('XPENDING', stream, info.name)
    if pending[1] > 0 then keep = pending[2] end
    local ms, seq = keep:match('(%d+)-(%d+)')
    ms, seq = tonumber(ms), tonumber(seq)
    if not lowest or ms < lowest.ms or (ms == lowest.ms and seq < lowest.seq) then
      lowest = {ms = ms, seq = seq, id = keep}
    end
  end
  if not lowest then return 0 end
  return redis.call('XTRIM', stream, 'MINID', '=', lowest.id)
end
