// The panel types of the dashboards, as thin as they can be over the components that Grafana's own panels draw with.
import {
  FieldType, PanelPlugin, getDisplayValueAlignmentFactors, getFieldDisplayValues,
  identityOverrideProcessor, standardFieldConfigEditorRegistry, standardTransformers, standardTransformersRegistry,
} from '@grafana/data';
import { config } from '@grafana/runtime';
import { sceneUtils } from '@grafana/scenes';
import { BigValue, Table, TimeSeries, VizRepeater, useTheme2 } from '@grafana/ui';
import { useEffect, useLayoutEffect, useMemo, useRef } from 'react';

const nothing = () => null;

/** What a panel says that has nothing to show: its own words, else Grafana's. */
const Empty = ({ fieldConfig }) => (
  <div className="empty">{fieldConfig.defaults.noValue || 'No data'}</div>
);

const hasNumbers = (frame) => frame.length > 0 && frame.fields.some((field) => field.type === FieldType.number);

/** As Grafana's panel does: what is not finite is no point, and does not spoil the scale. */
const finite = (frame) => ({
  ...frame,
  fields: frame.fields.map((field) =>
    field.type === FieldType.number
      ? { ...field, values: field.values.map((value) => (Number.isFinite(value) ? value : null)) }
      : field,
  ),
});

function TimeSeriesPanel({ data, timeRange, timeZone, width, height, options, fieldConfig, replaceVariables }) {
  const frames = useMemo(() => data.series.filter(hasNumbers).map(finite), [data.series]);
  if (!frames.length) {
    return <Empty fieldConfig={fieldConfig} />;
  }
  return (
    <TimeSeries
      frames={frames} structureRev={data.structureRev} timeRange={timeRange} timeZone={timeZone}
      width={width} height={height} legend={options.legend} options={options} replaceVariables={replaceVariables}
    >
      {(uplot) => <Annotations uplot={uplot} frames={data.annotations ?? []} />}
    </TimeSeries>
  );
}

/** A dashed line for each event, with a mark in its colour below the plot. */
function Annotations({ uplot, frames }) {
  const theme = useTheme2();
  const marks = useRef([]);
  const plot = useRef(null);
  marks.current = frames.flatMap((frame) => {
    const column = (name) => frame.fields.find((field) => field.name === name)?.values ?? [];
    return column('time').map((time, i) => ({ time, color: column('color')[i], title: column('title')[i] }));
  });
  useLayoutEffect(() => {
    uplot.addHook('draw', (drawn) => {
      const { ctx, bbox, valToPos, scales } = drawn;
      plot.current = drawn;
      ctx.save();
      for (const { time, color } of marks.current) {
        if (time >= scales.x.min && time <= scales.x.max) {
          const x = valToPos(time, 'x', true);
          ctx.strokeStyle = ctx.fillStyle = theme.visualization.getColorByName(color);
          ctx.lineWidth = 2 * devicePixelRatio;
          ctx.setLineDash([6 * devicePixelRatio, 4 * devicePixelRatio]);
          ctx.beginPath();
          ctx.moveTo(x, bbox.top);
          ctx.lineTo(x, bbox.top + bbox.height);
          ctx.stroke();
          const size = 5 * devicePixelRatio;
          ctx.beginPath();
          ctx.moveTo(x, bbox.top + bbox.height);
          ctx.lineTo(x - size, bbox.top + bbox.height + size);
          ctx.lineTo(x + size, bbox.top + bbox.height + size);
          ctx.fill();
        }
      }
      ctx.restore();
    });
  }, [uplot]);
  // They may come after the series.
  useEffect(() => plot.current?.redraw(false), [frames]);
  return marks.current.map(({ title, time, color }) => (
    <i hidden key={title + time} data-mark={title} style={{ color: theme.visualization.getColorByName(color) }} />
  ));
}

function StatPanel({ data, timeZone, width, height, options, fieldConfig, replaceVariables, renderCounter }) {
  const getValues = () =>
    getFieldDisplayValues({
      fieldConfig, replaceVariables, timeZone, data: data.series, reduceOptions: options.reduceOptions, theme: config.theme2,
    });
  const renderValue = ({ value, alignmentFactors, width, height, count }) => (
    <BigValue
      value={value.display} alignmentFactors={alignmentFactors} count={count} width={width} height={height} theme={config.theme2}
      colorMode={options.colorMode} graphMode={options.graphMode} justifyMode={options.justifyMode}
      textMode={options.textMode} wideLayout={options.wideLayout}
    />
  );
  if (!data.series.some((frame) => frame.length)) {
    return <Empty fieldConfig={fieldConfig} />;
  }
  return (
    <VizRepeater
      getValues={getValues} getAlignmentFactors={getDisplayValueAlignmentFactors} renderValue={renderValue}
      width={width} height={height} source={data} itemSpacing={3} autoGrid renderCounter={renderCounter}
      orientation={options.orientation}
    />
  );
}

function TablePanel({ data, width, height, options, fieldConfig }) {
  const [frame] = data.series;
  return frame?.length ? (
    <Table data={frame} width={width} height={height} cellHeight={options.cellHeight} />
  ) : (
    <Empty fieldConfig={fieldConfig} />
  );
}

/** Field options that only one panel type knows, with the values that Grafana's own has by default. */
const custom = (defaults) => (builder) => {
  for (const [path, defaultValue] of Object.entries(defaults)) {
    builder.addCustomEditor({
      id: path, path, name: path, defaultValue, editor: nothing, override: nothing,
      process: identityOverrideProcessor, shouldApply: () => true,
    });
  }
};

const GRAPH = {
  drawStyle: 'line', lineInterpolation: 'linear', lineWidth: 1, fillOpacity: 0, gradientMode: 'none', pointSize: 5,
  showPoints: 'auto', spanNulls: false, insertNulls: false, lineStyle: { fill: 'solid' }, axisPlacement: 'auto',
  axisSoftMin: undefined, axisSoftMax: undefined, axisLabel: '', axisColorMode: 'text', axisBorderShow: false, axisCenteredZero: false, barAlignment: 0,
  scaleDistribution: { type: 'linear' }, stacking: { mode: 'none', group: 'A' }, thresholdsStyle: { mode: 'off' },
  hideFrom: { tooltip: false, viz: false, legend: false },
};
const STAT = {
  reduceOptions: { values: false, calcs: ['lastNotNull'], fields: '' }, orientation: 'auto', textMode: 'auto',
  wideLayout: true, colorMode: 'value', graphMode: 'area', justifyMode: 'auto',
};
const STANDARD = ['unit', 'min', 'max', 'decimals', 'displayName', 'noValue', 'thresholds', 'mappings', 'links', 'color'];

const plugin = (Panel, fields, options = {}) => {
  const made = new PanelPlugin(Panel).useFieldConfig({
    standardOptions: { color: { defaultValue: { mode: 'palette-classic' } } },
    useCustomConfig: custom(fields),
  });
  return made.setPanelOptions((builder) => {
    for (const [path, defaultValue] of Object.entries(options)) {
      builder.addCustomEditor({ id: path, path, name: path, defaultValue, editor: nothing });
    }
  });
};

/** Make panel types, field options and transformations known to Grafana's libraries. */
export function register() {
  standardFieldConfigEditorRegistry.setInit(() =>
    STANDARD.map((id) => ({
      id, path: id, name: id, editor: nothing, override: nothing, process: identityOverrideProcessor, shouldApply: () => true,
    })),
  );
  const { organizeFieldsTransformer: organize } = standardTransformers;
  standardTransformersRegistry.setInit(() => [{ id: organize.id, name: organize.name, transformation: organize }]);
  sceneUtils.registerRuntimePanelPlugin({
    pluginId: 'timeseries',
    plugin: plugin(TimeSeriesPanel, GRAPH).setDataSupport({ annotations: true, alertStates: false }),
  });
  sceneUtils.registerRuntimePanelPlugin({ pluginId: 'stat', plugin: plugin(StatPanel, {}, STAT) });
  sceneUtils.registerRuntimePanelPlugin({
    pluginId: 'table',
    plugin: plugin(TablePanel, { align: 'auto', inspect: false, filterable: false }, { cellHeight: 'sm', showHeader: true }),
  });
}
