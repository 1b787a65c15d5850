// As endings.py, for Node: which events a socket emits.
'use strict';
const say = (event, facts) => process.stdout.write(JSON.stringify({event, pid: process.pid, ...facts}) + '\n');
const server = require('net').createServer((sock) => {
  const words = [];
  say('serving', {fd: sock._handle.fd});
  sock.resume();
  sock.on('error', (error) => words.push(`error ${error.code}`));
  sock.on('end', () => words.push('end'));
  sock.on('close', () => say('ended', {words: [...words, 'close']}));
});
server.listen(Number(process.argv[2]), '0.0.0.0', () => say('listening', {}));
